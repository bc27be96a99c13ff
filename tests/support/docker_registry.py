"""A registry of images on loopback, with a login: Debian's docker-registry.

Knows: how to run it inside the network of one or more test engines, and how they push and pull.
Does not know: pytest.

Every engine has a loopback of its own, so each is served by a process of its own over one
storage folder, at the same address: what one pushes the others pull, by the same reference. An
engine takes plain HTTP from 127.0.0.0/8 only; the machine itself cannot reach the registry (give
a program ``dockerd.inside(...)`` to run it there). Use::

    with Registry(tmp_path) as registry:
        registry.serve(one), registry.serve(two)
        pinned = registry.push(one, "bb:1", "lab/bb:1")   # 127.0.0.1:5000/lab/bb@sha256:…
        registry.pull(two, registry.reference("lab/bb:1"))
        registry.stop(two)                                # refuses connections from now on

The login is ``USER`` and ``PASSWORD``; ``login`` is the value of X-Registry-Auth.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

from tests.support.dockerds import Dockerd, raise_for_errors

USER: Final = "kohaku"
PASSWORD: Final = "river"

#: bcrypt at its cheapest, cost 4, as `htpasswd -nbBC 4 kohaku river` made it.
_HTPASSWD: Final = f"{USER}:$2y$04$mxQayEpVfTMAsikQu5.uvOOZHX2FEG4cnEaNHweB97sqMmrWaTMy2\n"


class Registry:
    """One storage of images, served to every engine that asks for it."""

    def __init__(self, folder: Path, *, port: int = 5000, open_to_all: bool = False) -> None:
        """Take where its files go, and whether it wants the login."""
        self.address = f"127.0.0.1:{port}"
        self.folder = folder
        self.login = login_header(USER, PASSWORD, self.address)
        self._open = open_to_all
        self._served: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self, dockerd: Dockerd, timeout_s: float = 30) -> None:
        """Serve this engine, and return when it may ask.

        Raises:
            RuntimeError: It did not come up; with its log.
        """
        config, log = self._write_config(), self.folder / f"{dockerd.name}.log"
        # Of the last time it was served.
        log.unlink(missing_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                dockerd.inside("docker-registry", "serve", str(config)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
            )
        self._served[dockerd.name] = process
        end = time.monotonic() + timeout_s
        while b"listening on" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the registry does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.01)

    def stop(self, dockerd: Dockerd) -> None:
        """Serve this engine no more; the images stay."""
        process = self._served.pop(dockerd.name)
        process.kill()
        process.wait(10)

    def close(self) -> None:
        """End all its processes; ``folder`` stays, it is not ours."""
        while self._served:
            # Those of an engine that was closed before are dead already.
            _, process = self._served.popitem()
            process.kill()
            process.wait(10)

    def reference(self, name: str) -> str:
        """Give what an engine calls the image ``name`` in here."""
        return f"{self.address}/{name}"

    def push(self, dockerd: Dockerd, image: str, name: str) -> str:
        """Push an image that the engine has, as ``name``, such as ``lab/bb:1``.

        Returns:
            Its reference by digest.

        Raises:
            DockerRefused: In the engine's words.
        """
        repository, tag = self.reference(name).rsplit(":", 1)
        local = f"/images/{quote(repository, safe='')}"
        dockerd.ask("POST", f"/images/{image}/tag?repo={quote(repository, safe='')}&tag={tag}")
        try:
            headers = {"X-Registry-Auth": self.login}
            told = dockerd.ask("POST", f"{local}/push?tag={tag}", headers=headers)
            raise_for_errors(told)
        finally:
            dockerd.ask("DELETE", f"{local}:{tag}")
        digests = [line["aux"]["Digest"] for line in told if "aux" in line]
        return f"{repository}@{digests[-1]}"

    def pull(self, dockerd: Dockerd, reference: str, login: str | None = None) -> None:
        """Pull an image, with the right login unless another is given.

        Raises:
            DockerRefused: In the engine's words.
        """
        headers = {"X-Registry-Auth": self.login if login is None else login}
        from_image = quote(reference, safe="")
        told: Any = dockerd.ask("POST", f"/images/create?fromImage={from_image}", headers=headers)
        raise_for_errors(told)

    def _write_config(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        passwords = self.folder / "htpasswd"
        passwords.write_text(_HTPASSWD)
        config: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "info"},
            "storage": {
                "filesystem": {"rootdirectory": str(self.folder / "storage")},
                "delete": {"enabled": True},
            },
            # One secret for all processes: an upload may be continued by any of them.
            "http": {"addr": self.address, "secret": "of tests"},
        }
        if not self._open:
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(passwords)}}
        file = self.folder / "config.yml"
        # Every JSON is a YAML.
        file.write_text(json.dumps(config))
        return file


def what_registry_is_missing() -> str:
    """Say what a registry needs that this machine has not; empty where it can run."""
    return "" if shutil.which("docker-registry") else "not installed: docker-registry"


def login_header(user: str, password: str, address: str) -> str:
    """Give the value of X-Registry-Auth for a login."""
    login: Mapping[str, str] = {
        "username": user,
        "password": password,
        "serveraddress": address,
    }
    return base64.urlsafe_b64encode(json.dumps(login).encode()).decode()
