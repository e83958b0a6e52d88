"""Commands that generate text: `run`, on the terminal, and `serve`, for other programs."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import options, streams
from quantkit.cli.chat import chat_on_terminal, show_answer
from quantkit.cli.options import Placement, Shared
from quantkit.cli.values import MODEL_FILE, SEED, TEXT_FILE, TOKENS, Sampled, name_of
from quantkit.errors import QuantkitError, needs

if TYPE_CHECKING:
    from quantkit.runtime.generate import Sampling


def _text(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return None if value is None else streams.text_of(value, name_of(param))


@dataclass(frozen=True)
class Question:
    """What `run` is to answer: a prompt to continue, or with `chat` to be put through the template; None: a chat on the
    terminal, which begins with the system's message if there is one."""

    prompt: str | None
    chat: bool
    thinking: bool | None
    system: str | None


def _question(
    prompt: str | None, prompt_file: Path | None, chat: bool, thinking: bool | None, system: str | None
) -> Question:
    """QuantkitError for options that exclude each other."""
    if prompt is not None and prompt_file is not None:
        raise QuantkitError("-p and -f both give the prompt: leave one out")
    if prompt_file is not None:
        from quantkit.formats.byte_source import read_text

        prompt = streams.whole_input() if str(prompt_file) == "-" else read_text(prompt_file, "text")
    if prompt is not None and not chat:
        for name, given in (("--thinking", thinking), ("--system", system)):
            if given is not None:
                raise QuantkitError(f"{name} is for chats: add --chat, which puts the prompt through the chat template")
    return Question(prompt, chat, thinking, system)


def _sampling(**given: Any) -> "Sampling":
    """given: fields of Sampling, by their names."""
    from quantkit.runtime.generate import Sampling

    return Sampling(**given)


@click.command()
@click.argument("file", type=MODEL_FILE)
@Shared(
    (
        click.option(
            "-p",
            "--prompt",
            default=None,
            callback=_text,
            help="Continue this text; without it: a chat on the terminal.",
        ),
        click.option(
            "-f", "--prompt-file", type=TEXT_FILE, default=None, help="Continue this file's text; -: stdin's."
        ),
        click.option("--chat", is_flag=True, help="Put the prompt through the file's chat template."),
        click.option("--system", "-sys", default=None, callback=_text, help="In a chat: the system's message."),
        click.option(
            "--thinking/--no-thinking",
            default=None,
            help="In a chat: whether to reason, where the template has a switch.",
        ),
    ),
    "question",
    _question,
)
@click.option("-n", "--n-tokens", default=None, type=click.IntRange(1), help="Default: 128; in a chat, the context.")
@click.option("--context", "-c", default="4k", show_default=True, type=TOKENS, help="Tokens in all.")
@Shared(
    (
        click.option(
            "--temperature",
            "--temp",
            default=0.6,
            show_default=True,
            type=Sampled("temperature"),
            help="0 for greedy; OpenAI's API ends at 2.",
        ),
        click.option("--top-p", default=0.95, show_default=True, type=Sampled("top_p")),
        click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="0: all tokens."),
        click.option("--min-p", default=0.0, show_default=True, type=Sampled("min_p")),
        click.option("--seed", default=0, show_default=True, type=SEED),
    ),
    "sampling",
    _sampling,
)
@options.placement
@options.threads
def run(
    file: Path,
    question: Question,
    n_tokens: int | None,
    context: int,
    sampling: "Sampling",
    placement: Placement,
) -> None:
    """Generate text with a GGUF, or chat with it: on the GPU if there is one, experts that do not fit on the CPU."""
    from quantkit.machine import chosen_device
    from quantkit.runtime.engines.open import open_engine
    from quantkit.runtime.sources.gguf import open_gguf
    from quantkit.serving.chat import Conversation
    from quantkit.serving.template import reasoning

    thinking, prompt = question.thinking, question.prompt
    show_placement()
    weights = open_gguf(file, chosen_device(placement.device), ram=placement.ram)
    given = {} if thinking is None else reasoning(weights.file.metadata, thinking)
    talk = Conversation(weights, open_engine(weights, 1, context, placement.gpu_layers), sampling, given)
    if question.system:
        talk.messages = [{"role": "system", "content": question.system}]
    if prompt is None:
        return chat_on_terminal(talk, n_tokens or context)
    if question.chat:
        show_answer(talk.ask(prompt, n_tokens or 128))
    else:
        show_answer((piece, False) for piece in talk.complete(prompt, n_tokens or 128))
    click.echo(talk.speed, err=True)


def show_placement() -> None:
    """From here on the runtime tells where it put the layers."""
    logger = logging.getLogger("quantkit.runtime")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)


@dataclass(frozen=True)
class Door:
    """Where requests come in, the key that they have to bring, which web pages may send some, and how many may wait;
    what clients may call the model, and whether they get its reasoning in a field of its own."""

    host: str
    port: int
    api_key: str | None
    queue: int
    cors: str
    alias: str
    reasoning_content: bool


@click.command()
@click.argument("file", type=MODEL_FILE)
@Shared(
    (
        click.option(
            "--host",
            default="127.0.0.1",
            show_default=True,
            metavar="ADDRESS[,NAME]...",
            help="Listen here; others can reach 0.0.0.0. NAME: clients may call it so too.",
        ),
        click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one."),
        click.option(
            "--api-key",
            default=lambda: os.environ.get("QUANTKIT_API_KEY"),  # click would take an empty one for none
            help="Ask for it; or in $QUANTKIT_API_KEY. none: whoever reaches it may ask.",
        ),
        click.option("--queue", default=256, show_default=True, type=click.IntRange(1), help="Requests that may wait."),
        click.option("--cors", default="", metavar="ORIGIN[,ORIGIN]...", help="Web pages that may ask; *: all."),
        click.option("--alias", default="", metavar="NAME[,NAME]...", help="What clients may call the model, too."),
        click.option("--reasoning-content", is_flag=True, help="In chats, reasoning apart from the content."),
    ),
    "door",
    Door,
)
@click.option("--context", "-c", default="4k", show_default=True, type=TOKENS, help="Tokens of a sequence.")
@click.option("--parallel", default=4, show_default=True, type=click.IntRange(1), help="Sequences decoded at once.")
@options.placement
@options.threads
def serve(file: Path, door: Door, context: int, parallel: int, placement: Placement) -> None:
    """Serve a GGUF to OpenAI clients: /v1/chat/completions, /v1/completions, /v1/models; a page to chat on at /."""
    with needs("serve"):
        from quantkit.serving.gate import Gate

    host, *names = door.host.split(",")
    gate = Gate.of(host, names, door.api_key, door.cors.split(","))  # before anything heavy is loaded
    with needs("serve"):
        from quantkit.serving import http

    from quantkit.machine import chosen_device
    from quantkit.runtime.engines.open import open_engine
    from quantkit.runtime.sources.gguf import open_gguf

    device, listener = chosen_device(placement.device), http.bind(host, door.port)
    show_placement()
    weights = open_gguf(file, device, ram=placement.ram)
    engine = open_engine(weights, parallel, context, placement.gpu_layers)
    aliases = tuple(name.strip() for name in door.alias.split(",") if name.strip())
    settings = http.Settings(queue=door.queue, aliases=aliases, parted=door.reasoning_content)
    http.serve(weights, engine, listener, settings, gate)
