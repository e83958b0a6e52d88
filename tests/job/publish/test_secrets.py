"""What is taken for a secret or a local place, however it is written; and what is not."""

import base64
import json

import pytest

from quantkit.errors import QuantkitError
from quantkit.job.publish.secrets import refuse_local, refuse_secrets, without_local

TOKEN = "hf_" + "aB3dEfGhIj" * 3
SECRETS = {
    "plain": TOKEN,
    "within a word": f"x{TOKEN}",
    "userinfo": "https://user:pw@host.example/x",
    "userinfo without a password": f"https://{'a' * 20}@host.example/x",
    "git": "ssh+git://x:y@10.0.0.1:22/r",
    "query": "https://h.example/x?access_token=abcdef123",
    "signed": "https://h.example/x?a=1&X-Amz-Signature=0123456789abcdef",
    "azure": "https://h.example/x?sv=2&sig=0123456789abcdef",
    "header": '{"Authorization": "Bearer abcdefgh1234"}',
    "github": "ghp_" + "a1" * 18,
    "aws": "AKIA" + "ABCD" * 4,
    "openai": "sk-proj-" + "a1" * 16,
    "jwt": "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abcdef",
    "key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}


def json_escaped(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" for c in text)


WRITTEN = {
    "as it is": str,
    "JSON": json_escaped,
    "JSON twice": lambda text: json.dumps(json_escaped(text)),
    "percent": lambda text: "".join(f"%{b:02X}" for b in text.encode()),
    "percent twice": lambda text: "".join(f"%25{b:02x}" for b in text.encode()),
    "HTML": lambda text: "".join(f"&#{ord(c)};" for c in text),
    "JSON slashes": lambda text: text.replace("/", "\\/"),
    "base64": lambda text: base64.b64encode(f"user:{text}".encode()).decode(),
    "UTF-16": lambda text: text.encode("utf-16-le"),
}


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_found(kind, written):
    secret = WRITTEN[written](SECRETS[kind])
    with pytest.raises(QuantkitError, match=r"^f\.json: holds ") as error:
        refuse_secrets("f.json", b"before " + secret + b" after" if isinstance(secret, bytes) else f"a {secret} b")
    assert SECRETS[kind] not in str(error.value)


def test_the_users_own_secrets_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_API_KEY", "correct horse battery")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path))
    with pytest.raises(QuantkitError, match="of your environment"):
        refuse_secrets("x", "say correct horse battery")
    refuse_secrets("x", f"say {tmp_path}")


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/user/name/resolve/main/x.gguf?download=true",
        "mail me@example.org; tokens=131072&chunk=512; 8 tokens/s",
        "hf_transfer, hf_hub_download, task-specific sk-learn, sha256 " + "0123456789abcdef" * 4,
        "{% for message in messages %}<｜User｜>{{ message['content'] }}{% endfor %}",
    ],
)
def test_other_text_is_left_alone(text):
    refuse_secrets("x", text)


def test_local_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for text in ("/home/somebody/x", json_escaped(f"{tmp_path}/x"), "%2Fhome%2Fsomebody%2Fx"):
        with pytest.raises(QuantkitError, match="where files lie"):
            refuse_local("x", text, tmp_path / "out")
    refuse_local("x", "/usr/lib is nobody's", tmp_path / "out")
    found = without_local(
        {
            "command": "quantkit make /a/b",
            "data": ["/home/me/my texts/a.txt", "math=/home/me/b.txt:text", "user/name", "C:\\Users\\me\\c.txt"],
            "address": "https://example.org/a/b/c",
            "line": "read ~/x/y.txt and /tmp/z/w.txt, 3 tokens/s",
            "n": 3,
        }
    )
    assert found == {
        "data": ["a.txt", "math=b.txt:text", "user/name", "c.txt"],
        "address": "https://example.org/a/b/c",
        "line": "read y.txt and w.txt, 3 tokens/s",
        "n": 3,
    }
