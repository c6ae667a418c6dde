"""Docker contexts, as the Docker CLI stores them."""

import hashlib
import json
from pathlib import Path

import pytest


def docker_context(monkeypatch: pytest.MonkeyPatch, folder: Path, host: str) -> None:
    """Make a context in DOCKER_CONFIG the current one, as `docker context create` and `use` do."""
    (folder / "config.json").write_text('{"currentContext": "colima"}')
    meta = folder / "contexts" / "meta" / hashlib.sha256(b"colima").hexdigest()
    meta.mkdir(parents=True)
    endpoint = {"Host": host, "SkipTLSVerify": False}
    content = {"Name": "colima", "Metadata": {}, "Endpoints": {"docker": endpoint}}
    (meta / "meta.json").write_text(json.dumps(content))
    monkeypatch.delenv("DOCKER_HOST")
