"""Text in, text out: prompt, chat template, generation and streaming decode."""

from collections.abc import Iterator
from pathlib import Path

import jinja2
import jinja2.sandbox

from quantkit.arch import tokenizer as tokenizers
from quantkit.errors import QuantkitError
from quantkit.runtime.generate import Model, Sampling, generate
from quantkit.runtime.sources import GGUFSource


def apply_template(metadata, messages: list[dict[str, str]]) -> str:
    """The file's own chat template, in jinja2's sandbox: templates come from strangers."""
    if "tokenizer.chat_template" not in metadata:
        raise QuantkitError("this file has no chat template; run without --chat")
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {f"{k}_token": tokens[metadata.get(f"tokenizer.ggml.{k}_token_id", 0)] for k in ("bos", "eos")}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        template = environment.from_string(metadata["tokenizer.chat_template"])
        return template.render(messages=messages, add_generation_prompt=True, **names)
    except jinja2.TemplateError as error:
        raise QuantkitError(f"the file's chat template fails: {error}") from None


def converse(path: Path, prompt: str, chat: bool, n_tokens: int, how: Sampling, device: str) -> Iterator[str]:
    """The prompt's continuation, piece by piece as it is generated."""
    source = GGUFSource(path, device)
    tokenizer = source.tokenizer()
    text = apply_template(source.file.metadata, [{"role": "user", "content": prompt}]) if chat else prompt
    ids = tokenizers.encode(tokenizer, text)
    if ids[:1] != [source.config.bos]:
        ids.insert(0, source.config.bos)
    made: list[int] = []
    shown = ""
    for token in generate(Model(source), ids, n_tokens, how):
        made.append(token)
        whole = tokenizer.decode(made, skip_special_tokens=False)
        if not whole.endswith("\ufffd"):  # a character may take several tokens
            yield whole[len(shown) :]
            shown = whole
