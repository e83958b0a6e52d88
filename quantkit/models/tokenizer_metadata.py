"""A checkpoint's tokenizer and chat templates as GGUF metadata, from all files that say something of them.

The upload of January 2025 has a chat template in tokenizer_config.json and tokens by name there. Others have them in
chat_template.jinja, as a list of named templates, in special_tokens_map.json, or as ids in config.json or
generation_config.json. What is in none of them is refused, where text cannot be computed without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text, read_text_file
from quantkit.formats.gguf_values import U32, I32List
from quantkit.formats.safetensors_header import load_object
from quantkit.formats.tensor_table import CONFIG
from quantkit.models import tiktoken
from quantkit.models.added_tokens import SETTINGS, TOKENIZER, added_in_settings, with_settings
from quantkit.models.tokenizer import WHOLE_WORDS, Patterns, built, check_alike, rebuilt
from quantkit.models.tokenizer_json import around, id_of, named, text_of, tokenizer_of_json
from quantkit.progress import say_once

TOKEN_MAP = "special_tokens_map.json"
GENERATION, TEMPLATE, PROCESSOR_TEMPLATE = "generation_config.json", "chat_template.jinja", "chat_template.json"
WITHOUT_BOS: Mapping[str, str] = {"glm4": "[gMASK]"}
"""Pre-tokenizers of models whose texts begin without a BOS, unless a file says otherwise -> the token that is written
as BOS where no file names one, as llama.cpp's converter does: what their chats begin with."""
ADDED = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
MORE_TEMPLATES = "additional_chat_templates"
FILES = (TOKENIZER, tiktoken.FILE, SETTINGS, TOKEN_MAP, GENERATION, TEMPLATE, PROCESSOR_TEMPLATE)
"""Names of the files that are read, for those who fetch them."""


def read_tokenizer(folder: Path, known: Patterns) -> Tokenizer:
    """The checkpoint's own tokenizer. QuantkitError for what no GGUF can say (see tokenizer_json)."""
    return tokenizer_of_json(_tokenizer_json(folder), known, str(file_of(folder)))


def file_of(folder: Path) -> Path:
    """The file that has the vocabulary: tokenizer.json, or tiktoken.model where there is none."""
    others = folder / tiktoken.FILE
    return others if others.is_file() and not (folder / TOKENIZER).is_file() else folder / TOKENIZER


def tokenizer_metadata(folder: Path, n_vocab: int, known: Patterns, template: str | None = None) -> dict[str, Any]:
    """`tokenizer.*` keys for a checkpoint folder.

    n_vocab: rows of the embedding; missing ids become [PADi]. known: pre-tokenizers that it may have, `family.PRE`.
    template: for chats, where no file has one.
    QuantkitError, naming file and key, for what llama.cpp would read as another tokenizer, and for a BOS or EOS that no
    file names. Says in a line what is left out.
    """
    try:
        found = _metadata(folder, n_vocab, known)
        return found | templates_metadata(chat_templates(folder), folder, template)
    except (TypeError, KeyError, AttributeError) as error:
        raise QuantkitError(f"{folder / TOKENIZER}: not the structure of a BPE tokenizer ({error})") from None


def _metadata(folder: Path, n_vocab: int, known: Patterns) -> dict[str, Any]:
    raw, where = _tokenizer_json(folder), str(file_of(folder))
    pre = named(raw, known, where)
    settings = _optional(folder / SETTINGS)
    tokens, types = _tokens(raw, n_vocab, folder)
    merges = _merges(raw["model"]["merges"], where)
    special = SpecialTokens(folder, settings, tokens, WITHOUT_BOS.get(pre))
    out: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": I32List(types),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": _flag(settings, "add_bos_token", pre not in WITHOUT_BOS, folder),
        "tokenizer.ggml.add_eos_token": _flag(settings, "add_eos_token", False, folder),
    }
    out |= special.metadata()
    _check_around(raw, where, out)
    added = [token for token, kind in zip(tokens, types, strict=True) if kind in ADDED]
    described = built(lambda: rebuilt(tokens, types, merges, known[pre], pre in WHOLE_WORDS), where)
    check_alike(tokenizer_of_json(raw, known, where), described, where, added)
    return out


def _flag(settings: Mapping[str, Any], key: str, default: bool, folder: Path) -> bool:
    value = settings.get(key)
    if value is not None and not isinstance(value, bool):
        raise QuantkitError(f"{folder / SETTINGS}: {key} {value!r:.60} is neither true nor false")
    return default if value is None else value


def _merges(given: Sequence[Any], where: str) -> list[str]:
    """As a GGUF has them: two tokens and a space between."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in given]
    wrong = next((pair for pair in pairs if len(pair) != 2 or any(" " in text_of(token) for token in pair)), None)
    if wrong is not None:
        raise QuantkitError(f"{where}: merge {wrong!r:.80} is not of two tokens without a space; a GGUF cannot say it")
    return [f"{first} {second}" for first, second in pairs]


def _check_around(raw: Mapping[str, Any], where: str, out: Mapping[str, Any]) -> None:
    """The post-processor puts around a text what the GGUF's keys do: BOS, and EOS if that is said."""
    before, after = around(raw, where)
    tokens = out["tokenizer.ggml.tokens"]
    bos, eos = (tokens[out[f"tokenizer.ggml.{key}_token_id"].value] for key in ("bos", "eos"))
    ends = ([], [eos]) if out["tokenizer.ggml.add_eos_token"] else ([],)
    if before not in ([], [bos]) or after not in ends:
        raise QuantkitError(
            f"{where}: post-processor 'TemplateProcessing' puts {before} before a text and {after} after it; a GGUF "
            f"can say BOS {bos!r} before, and EOS after if add_eos_token in {SETTINGS} is true"
        )


class SpecialTokens:
    """Which tokens begin, end and pad a text, by whichever file says so; by name before by id. bos: in its place where
    none does."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], tokens: Sequence[str], bos: str | None = None
    ) -> None:
        self.folder, self.n_vocab, self.bos = folder, len(tokens), bos
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.named = [(SETTINGS, settings), (TOKEN_MAP, _optional(folder / TOKEN_MAP))]
        self.numbered = [(CONFIG, _optional(folder / CONFIG)), (GENERATION, _optional(folder / GENERATION))]

    def metadata(self) -> dict[str, Any]:
        """`tokenizer.ggml.*_token_id`. QuantkitError if a text has no beginning or no end, or either is no token."""
        found = {"bos": self._must("bos"), "eos": self._must("eos")}
        if (padding := self._padding()) is not None:
            found["padding"] = padding
        # llama.cpp ends an answer at any of eos, eot and eom; a chat fine-tune may list what else ends a turn.
        others = [token for token in dict.fromkeys(self._other_ends()) if token != found["eos"]]
        found |= dict(zip(("eot", "eom"), others, strict=False))
        if len(others) > 2:
            say_once(f"warning: {self.folder / GENERATION}: a GGUF has no place for the end tokens {others[2:]}")
        return {f"tokenizer.ggml.{key}_token_id": U32(token) for key, token in found.items()}

    def _must(self, key: str) -> int:
        """The id of a token that every text needs."""
        for file, values in self.named:
            if (name := _content(values.get(f"{key}_token"))) is not None:
                if name not in self.ids:
                    raise QuantkitError(f"{self.folder / file}: {key}_token {name!r} is not in the vocabulary")
                return self.ids[name]
        for file, values in self.numbered:
            if given := _listed(values.get(f"{key}_token_id")):
                return self._checked(given[0], f"{self.folder / file}: {key}_token_id")
        if key == "bos" and self.bos in self.ids:
            return self.ids[self.bos]
        raise QuantkitError(
            f"{self.folder}: no file says which token is {key.upper()}: {key}_token in {SETTINGS} or {TOKEN_MAP}, or "
            f"{key}_token_id in {CONFIG} or {GENERATION}; add it"
        )

    def _padding(self) -> int | None:
        for file, values in self.named:
            if (name := _content(values.get("pad_token"))) is not None:
                if name not in self.ids:
                    say_once(f"warning: {self.folder / file}: pad_token {name!r} is not in the vocabulary; left out")
                    return None
                return self.ids[name]
        return None

    def _other_ends(self) -> Iterator[int]:
        for file, values in self.numbered:
            given = _listed(values.get("eos_token_id"))
            if len(given) > 1 or file == GENERATION:
                yield from (self._checked(i, f"{self.folder / file}: eos_token_id") for i in given)

    def _checked(self, token: Any, where: str) -> int:
        if type(token) is not int or not 0 <= token < self.n_vocab:
            raise QuantkitError(f"{where} {token!r} is not a token: there are {self.n_vocab:,}")
        return token


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """config.json's `bos_token_id` and `eos_token_id` as the tokenizer has them."""
    return {f"{key}_token_id": int(metadata[f"tokenizer.ggml.{key}_token_id"].value) for key in ("bos", "eos")}


def chat_templates(folder: Path, settings: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Name -> template; the one that is used is called `default`. Empty if the model has none.

    In transformers' order: chat_template.jinja (and additional_chat_templates/NAME.jinja), then what
    tokenizer_config.json has, text or a list of named ones, then chat_template.json.
    """
    found = {}
    if (folder / TEMPLATE).is_file():
        found["default"] = _file_text(folder / TEMPLATE)
    for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja")):
        found[path.stem] = _file_text(path)
    settings = _optional(folder / SETTINGS) if settings is None else settings
    in_settings = _named(settings.get("chat_template"), folder / SETTINGS)
    if found and in_settings.get("default", found.get("default")) != found.get("default"):
        say_once(f"{folder}: {TEMPLATE} is used; {SETTINGS} has another chat template")
    return found or in_settings or _named(_optional(folder / PROCESSOR_TEMPLATE).get("chat_template"), folder)


def templates_metadata(templates: Mapping[str, str], folder: Path, template: str | None = None) -> dict[str, Any]:
    """`tokenizer.chat_template`, and `tokenizer.chat_template.NAME` of others, as gguf-py names them. template: where
    there is none."""
    if not templates and template is not None:
        say_once(
            f"{folder}: no chat template in any file; the family's plain one is written, which knows no tools: put a "
            f"{TEMPLATE} there for another"
        )
        templates = {"default": template}
    elif not templates:
        say_once(
            f"warning: {folder}: no chat template in any file; `run` and chat clients cannot chat with the file; put a "
            f"{TEMPLATE} there"
        )
    elif "default" not in templates:
        say_once(f"warning: {folder}: no chat template is called default, only {', '.join(templates)}")
    out: dict[str, Any] = {"tokenizer.chat_template": templates["default"]} if "default" in templates else {}
    plain = {"".join(c if c.isascii() and c.isalnum() else "_" for c in name): name for name in templates}
    others = {name: templates[given] for name, given in plain.items() if given != "default"}
    if others:
        out["tokenizer.chat_templates"] = sorted(others)
    return out | {f"tokenizer.chat_template.{name}": others[name] for name in sorted(others)}


def _named(value: Any, where: Path) -> dict[str, str]:
    """A template, or a list of `{"name", "template"}`."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": text_of(value)}
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise QuantkitError(f"{where}: chat_template is neither text nor a list of named templates")
    return {text_of(one["name"]): text_of(one["template"]) for one in value}


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    """The file as it stands, or what tiktoken.model would be as one. QuantkitError for other kinds, and no JSON."""
    path = folder / TOKENIZER
    if not path.is_file() and (folder / tiktoken.FILE).is_file():
        return tiktoken.tokenizer_json(folder / tiktoken.FILE, added_in_settings(folder), folder / SETTINGS)
    if not path.is_file() and (folder / "tokenizer.model").is_file():
        raise QuantkitError(
            f"{folder}: has tokenizer.model (SentencePiece's model) and no {TOKENIZER}; only that or "
            f"{tiktoken.FILE} is supported"
        )
    return with_settings(load_object(read_text_file(path, "tokenizer"), str(path)), folder)


def _optional(path: Path) -> dict[str, Any]:
    return load_object(read_text_file(path, "tokenizer"), str(path)) if path.is_file() else {}


def _file_text(path: Path) -> str:
    return read_text(path, "tokenizer")


def _content(token: Any) -> str | None:
    """A token's text, which stands alone or in an AddedToken."""
    token = token.get("content") if isinstance(token, dict) else token
    return None if token is None else text_of(token)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _tokens(raw: Mapping[str, Any], n_vocab: int, folder: Path) -> tuple[list[str], list[int]]:
    kinds = gguf.TokenType
    by_id = {id_of(i): (text_of(token), kinds.NORMAL) for token, i in raw["model"]["vocab"].items()}
    if len(by_id) < len(raw["model"]["vocab"]):
        raise QuantkitError(f"{folder / TOKENIZER}: two tokens of the vocabulary have one id")
    beyond = max(by_id, default=0)
    for added in raw.get("added_tokens", ()):
        control = added["special"] or _looks_special(added["content"])
        if id_of(added["id"]) >= n_vocab and beyond < n_vocab:
            # A fine-tuner's pad token, the embedding left as it was: the model has never seen it.
            what = f"token {added['id']} {text_of(added['content'])!r}"
            say_once(f"warning: {folder / TOKENIZER}: {what} is beyond vocab_size {n_vocab}; left out")
            continue
        by_id[id_of(added["id"])] = (text_of(added["content"]), kinds.CONTROL if control else kinds.USER_DEFINED)
    texts = {text: i for i, (text, _) in by_id.items()}
    if twice := next((text for i, (text, _) in by_id.items() if texts[text] != i), None):
        raise QuantkitError(f"{folder / TOKENIZER}: token {twice!r} has more ids than one")
    if by_id and max(by_id) >= n_vocab:
        raise QuantkitError(f"{folder / TOKENIZER}: token id {max(by_id)} is beyond vocab_size {n_vocab}")
    full = [by_id.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(n_vocab)]
    return [token for token, _ in full], [int(kind) for _, kind in full]


def _looks_special(token: str) -> bool:
    """DeepSeek marks `<｜User｜>` and its like as ordinary; llama.cpp's converter writes them as control tokens."""
    return token.startswith(("<｜", "<|")) and token.endswith(("｜>", "|>"))
