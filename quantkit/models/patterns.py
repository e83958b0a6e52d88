"""What no file of a tokenizer says: the expression by which Kimi cuts text (it stands in its Python code,
tokenization_kimi.py), and the characters that stand for bytes."""

WORD = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
CAPITAL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_K2 = "|".join(  # pat_str of tokenization_kimi.py
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITAL}*{WORD}+{SHORT}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITAL}+{WORD}*{SHORT}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def characters_of_bytes() -> dict[int, str]:
    """Byte -> the character that stands for it in a byte-level vocabulary, as GPT-2 chose them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(others)}
