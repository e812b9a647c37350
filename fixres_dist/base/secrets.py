"""Secrets in texts that others read: what counts as one, and the text without them. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "REDACTED"  # letters only: a shell, YAML and JSON take it as it is
SHORTEST = 6  # characters of a value that is looked for elsewhere: a shorter one would be found in ordinary words

# Words of a variable's name (WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, PGPASSWORD) whose value is a secret.
WORDS = (
    r"(?:API_?KEY|(?<![A-Z])KEY(?![A-Z])|TOKEN(?!IZ)|SECRET|PASSW(?:OR)?D|PASSPHRASE|CREDENTIALS?|(?<![A-Z])AUTH(?![A-Z])"
    r"|(?<![A-Z])PASS(?![A-Z])|(?<![A-Z])PAT(?![A-Z]))"
)
NAME = re.compile(WORDS, re.IGNORECASE)
# Where a text gives a value to such a name: `export HF_TOKEN=x`, `"api_key": "x"`, `{DB_PASSWORD: x}`, `--auth-token x`.
VALUE = r"""(?P<value>(?:"[^"\n]*"|'[^'\n]*'|[^\s,;&}\])"'])+)"""  # a shell joins 'it'"'"'s' to one word
GIVEN = (
    re.compile(rf"""(?P<name>(?<!\w)[A-Z0-9_]*{WORDS}[A-Z0-9_]*["']?\s*[=:]\s*){VALUE}"""),
    re.compile(
        rf"(?P<name>(?<!\w)(?:--[\w-]*)?(?:password|passwd|passphrase|secret|api[_-]?key|(?:access|auth|api)[_-]token|--token)"
        rf"""(?![\w-])["']?(?:\s*[=:]\s*|\s+(?=\S))){VALUE}""",
        re.IGNORECASE,
    ),
    re.compile(rf"(?P<name>--[\w-]*(?:token|secret|password|passwd)[\w-]*[= ]){VALUE}", re.IGNORECASE),
    re.compile(rf"(?P<name>[?&][\w-]*(?:sig|signature|token|key|secret|credential|password)=){VALUE}", re.IGNORECASE),
    re.compile(r"(?P<name>\b(?:Bearer|Basic) )(?P<value>[\w.~+/=-]{8,})"),
    re.compile(r"(?P<name>\b[a-z][a-z0-9+.-]*://)(?P<value>[^\s/@'\"]*:[^\s/@'\"]*)(?=@)", re.IGNORECASE),
)
SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}"  # the hub of Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|A[KS]IA[A-Z0-9]{16}"  # Amazon's access keys
    r"|sk-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35}|pypi-[\w-]{16,}|npm_[A-Za-z0-9]{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r"|(?<![\w/])[0-9a-f]{40}(?![\w/])"  # Weights & Biases; in a path it is a commit
    r")|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)


def is_secret(name: str) -> bool:
    """Whether the value of an environment variable of this name is a secret."""
    return NAME.search(name) is not None


def redacted(text: str, env: Mapping[str, str] | None = None) -> str:
    """`text` with REDACTED in place of each secret: values given to names such as HF_TOKEN, texts in the form of known tokens,
    passwords in addresses, and wherever they stand the secret values of this process's environment and of `env`."""
    known = {value for name, value in [*os.environ.items(), *(env or {}).items()] if is_secret(name)}
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= SHORTEST:
            text = text.replace(value, REDACTED)
    for pattern in GIVEN:
        text = pattern.sub(lambda found: found["name"] + quoted_like(found["value"]), text)
    return SHAPES.sub(REDACTED, text)


def quoted_like(value: str) -> str:
    mark = value[0] if value[0] in "\"'" else ""
    return f"{mark}{REDACTED}{mark}"


def without_secrets(value: Any, env: Mapping[str, str] | None = None) -> Any:
    """JSON's kinds of values with every text in them redacted; in a mapping also what a name such as HF_TOKEN has."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED
            if isinstance(item, str) and item and key.isupper() and is_secret(key)
            else without_secrets(item, env)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item, env) for item in value]
    return redacted(value, env) if isinstance(value, str) else value
