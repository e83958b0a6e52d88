"""What is to be written, and how much of it."""

from dataclasses import dataclass
from typing import Literal

from quantkit.runtime.generate import Sampling

Kind = Literal["text", "chat", "code", "sum", "call", "needle"]
Mode = Literal["greedy", "sampled"]


@dataclass(frozen=True)
class Item:
    """One continuation to be written. key: its name, the same in every run. lead: the text before it. wanted: what the
    answer has to say. begun: the template began its reasoning."""

    key: str
    kind: Kind
    mode: Mode
    prompt: tuple[int, ...]
    n_tokens: int
    how: Sampling
    lead: str = ""
    wanted: str = ""
    begun: bool = False


@dataclass(frozen=True)
class Amount:
    """continuations: sampled ones of texts and chats together; n_tokens: of each at most; context: of the longest
    needle's text, in tokens."""

    continuations: int = 500
    n_tokens: int = 256
    context: int = 2048
