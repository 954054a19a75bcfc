"""Schedulers and workers as processes, as users start them, and certificates for them."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

SCHEDULER = r"Scheduler at: +(\S+)"
WORKER = r"Registered to: +(\S+)"
_START_S = 90


class Daemons:
    """Processes of ``dask scheduler`` and ``dask worker``; all end with the context.

    Parameters
    ----------
    folder : Path
        For their logs, and a working folder for each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Daemons:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start(
        self,
        kind: str,
        *arguments: str,
        says: str = "",
        prefix: Sequence[str] = (),
        python: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Start one and return what the log says when it is ready: of a scheduler its address."""
        folder = self.folder / str(len(self.running))
        folder.mkdir()
        log = folder / f"{kind}.log"
        command = [*prefix, sys.executable, *python, "-m", f"distributed.cli.dask_{kind}", *arguments, "--no-dashboard"]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=folder, env={**os.environ, **(env or {})}, start_new_session=True
            )
        self.running.append(process)
        end = time.monotonic() + _START_S
        pattern = says or (SCHEDULER if kind == "scheduler" else WORKER)
        while (found := re.search(pattern, log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        return found[1]


def make_certificates(folder: Path) -> dict[str, str]:
    """Write a CA, and a certificate signed by it with its key; return what tls_security takes."""
    folder.mkdir()
    now = dt.datetime.now(dt.UTC)

    def write(name: str, data: bytes) -> str:
        (folder / name).write_bytes(data)
        return str(folder / name)

    def certificate(name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name, by: ec.EllipticCurvePrivateKey):
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=key is by, path_length=None), critical=True)
        )
        return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA of {folder.name}")])
    pem = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return {
        "ca_file": write("ca.pem", certificate(f"CA of {folder.name}", authority, issuer, authority)),
        "cert": write("cert.pem", certificate("node", own, issuer, authority)),
        "key": write("key.pem", pem),
    }


def tls_options(tls: dict[str, str]) -> list[str]:
    """Return the options of Dask's and imgcurate's commands for the files of :func:`make_certificates`."""
    return ["--tls-ca-file", tls["ca_file"], "--tls-cert", tls["cert"], "--tls-key", tls["key"]]
