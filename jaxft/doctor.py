"""What an installation has and lacks: packages, devices, memory, caches and disk, each with how it stands."""

import os
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path
from typing import Any

import jax
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jaxft
from jaxft.cache import default_directory
from jaxft.devices import compile_cache_directory
from jaxft.errors import RunError
from jaxft.memory import gib
from jaxft.offload_check import check_offload

OK, NOTE, FAIL = "ok", "note", "FAIL"
DRIVERS = {"cuda13": 580, "cuda12": 525}  # the oldest driver that each CUDA takes, by NVIDIA's compatibility table
LITTLE_DISK = 5 << 30  # bytes: a checkpoint of a small model and its cache


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: under which heading, how it stands, and what was seen and is to be done."""

    heading: str
    status: str
    text: str

    def line(self) -> str:
        return f"{self.status:4}  {self.text}"


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi names it; driver '580.65.06', memory in bytes, used: by all processes."""

    name: str
    driver: str
    total: int
    used: int


def nvidia_cards() -> list[Card]:
    """The cards that nvidia-smi lists, [] where there is none or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run([program, *query], capture_output=True, text=True, timeout=15, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[word.strip() for word in line.split(",")] for line in found.splitlines()]
    # a card whose memory is the host's answers [N/A]
    sizes = [[int(word) << 20 if word.isdecimal() else 0 for word in row[2:]] for row in rows if len(row) == 4]
    return [Card(row[0], row[1], *size) for row, size in zip([r for r in rows if len(r) == 4], sizes, strict=True)]


def installed_versions() -> dict[str, str]:
    """Version by canonical name of every package here."""
    return {canonicalize_name(d.metadata["Name"]): d.version for d in distributions() if d.metadata["Name"]}


def requirements() -> list[Requirement]:
    """What jaxft asks for: of the installed package, or of pyproject.toml beside a source tree."""
    try:
        return [Requirement(text) for text in requires("jaxft") or []]
    except PackageNotFoundError:
        project = tomllib.loads((Path(jaxft.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = list(project["dependencies"])
    for extra, names in project["optional-dependencies"].items():
        for name in names:
            base, _, marker = name.partition(";")
            asked.append(f'{base}; extra == "{extra}"' + (f" and ({marker})" if marker else ""))
    return [Requirement(text) for text in asked]


def package_findings(installed: Mapping[str, str], asked: Sequence[Requirement], gpu: bool) -> Iterator[Finding]:
    """The versions that are here, and what is missing or other than asked for; those of [cuda] count on a GPU."""
    wanted = []
    for requirement in asked:
        plain = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        cuda = not plain and requirement.marker and requirement.marker.evaluate({"extra": "cuda"})
        if plain or (cuda and gpu):
            wanted.append((requirement, "jaxft" if plain else "jaxft[cuda]"))
    names = dict.fromkeys(canonicalize_name(requirement.name) for requirement, _ in wanted)
    shown = [f"{name} {installed[name]}" for name in names if name in installed]
    yield Finding("packages", OK, ", ".join(shown))
    for requirement, source in wanted:
        version = installed.get(canonicalize_name(requirement.name))
        if version is None:
            yield Finding("packages", FAIL, f"{requirement.name} is not installed: pip install '{source}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                "packages", FAIL,
                f"{requirement.name} is {version}, needed is {requirement.specifier}: pip install '{source}'",
            )  # fmt: skip
    if "jax" in installed and installed.get("jaxlib", installed["jax"]) != installed["jax"]:
        yield Finding(
            "packages", NOTE, f"jax is {installed['jax']}, jaxlib {installed['jaxlib']}: releases of one version fit"
        )


def import_findings(names: Sequence[str]) -> Iterator[Finding]:
    """Whether packages that are there can be imported."""
    for name in names:
        try:
            import_module(name)
        except Exception as error:  # whatever a broken package raises is what is to be told
            said = " ".join(f"{type(error).__name__}: {error}".split())
            yield Finding("packages", FAIL, f"{name} is installed and cannot be imported: {said}")


def gpu_finding(
    cards: Sequence[Card], platforms: Sequence[str], installed: Mapping[str, str], environ: Mapping[str, str],
    said: str = "",
) -> Finding | None:  # fmt: skip
    """Why jax does not use the cards that are here; None where it does, or there are none.

    platforms: of jax's devices. said: what jax answered when it was asked for CUDA.
    """
    if not cards or "gpu" in platforms:
        return None
    seen = (
        f"nvidia-smi lists {', '.join(card.name for card in cards)}, jax has only {', '.join(set(platforms)) or 'none'}"
    )
    asked = environ.get("JAX_PLATFORMS", "")
    if asked and not {"cuda", "gpu"} & set(asked.split(",")):
        return Finding("devices", NOTE, f"{seen}: JAX_PLATFORMS={asked} says so; unset it to use the GPU")
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("devices", NOTE, f"{seen}: CUDA_VISIBLE_DEVICES hides the rest; unset it to use the GPU")
    plugins = {f"cuda{n}": f"jax-cuda{n}-plugin" for n in (12, 13)}
    there = {cuda: name for cuda, name in plugins.items() if name in installed}
    if not there:
        text = f"{seen}: jax was installed without CUDA; pip install 'jaxft[cuda]'"
        return Finding("devices", FAIL, text)
    if len(there) > 1:
        return Finding("devices", FAIL, f"{seen}: {' and '.join(there.values())} are both installed; remove one")
    ((cuda, plugin),) = there.items()
    pjrt = plugin.replace("plugin", "pjrt")
    for name in (plugin, pjrt):
        version, jaxlib = installed.get(name), installed.get("jaxlib")
        if version != jaxlib:
            what = "is not installed" if version is None else f"is {version}"
            text = f"{seen}: {name} {what}, jaxlib {jaxlib}; both must be of one version: pip install -U 'jaxft[cuda]'"
            return Finding("devices", FAIL, text)
    driver = cards[0].driver
    if (number := driver.partition(".")[0]).isdecimal() and int(number) < DRIVERS[cuda]:
        text = f"{seen}: the driver is {driver}, {plugin} needs {DRIVERS[cuda]} or newer; update the driver"
        return Finding("devices", FAIL, text)
    return Finding(
        "devices", FAIL, f"{seen}, with {plugin} {installed[plugin]} and driver {driver}: {said or 'no reason given'}"
    )


def jax_devices() -> tuple[list[jax.Device], str]:
    """jax's local devices, and what it says where it has none, or where CUDA is asked for by name and does not come."""
    try:
        found = jax.local_devices()
    except RuntimeError as error:
        return [], " ".join(str(error).split())
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return found, " ".join(str(error).split())
    return found, ""


def device_findings(
    devices: Sequence[jax.Device], cards: Sequence[Card], environ: Mapping[str, str]
) -> Iterator[Finding]:
    """What jax computes on, and what memory there is."""
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if device.platform != "gpu":
            yield Finding("devices", OK, f"{device.platform}: {platform.processor() or platform.machine()}, "
                          f"{os.cpu_count()} threads")  # fmt: skip
            continue
        capability = getattr(device, "compute_capability", "?")
        memory = f", XLA may use {gib(limit)}" if limit else ""
        yield Finding("devices", OK, f"gpu {device.id}: {device.device_kind}, compute capability {capability}{memory}")
        if str(capability)[:1].isdecimal() and float(capability) < 8:
            yield Finding(
                "devices", NOTE,
                f"compute capability {capability}: no tensor cores for bfloat16 and no own kernels of attention and "
                "MLP, which need 8.0; --dtype float16 is the fast one here",
            )  # fmt: skip
    for card in cards:
        if card.total and card.used > card.total // 20:
            yield Finding(
                "devices", NOTE,
                f"{card.name}: {gib(card.used)} of {gib(card.total)} were in use before this command; what others hold "
                "a run cannot have",
            )  # fmt: skip
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" in environ:
        share = environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]
        yield Finding("devices", NOTE, f"XLA_PYTHON_CLIENT_MEM_FRACTION={share} sets what XLA may use of a card")
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), available_memory()
    yield Finding("devices", OK, f"memory of the host: {gib(total)}, {gib(free)} of it available")


def offload_finding() -> Finding:
    """Whether `--gradient_checkpointing offload…` gives the gradients that it should."""
    try:
        check_offload()
    except RunError as error:
        return Finding("devices", FAIL, str(error))
    return Finding("devices", OK, "residuals on the host: the gradients are those of kept ones")


def available_memory() -> int:
    """Bytes that processes can still have; of a page cache that can be dropped, too."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) << 10 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def meaning_of_cpu() -> list[Finding]:
    """What it means that a run here would compute on a CPU."""
    texts = (
        "a run here computes on the CPU, in float32 unless --dtype says otherwise: right in every number, and slow; "
        "`python -m jaxft.train --dry_run …` estimates how slow",
        "attention, MLP, norms and NF4 go by plain XLA: the Triton and cuDNN kernels need an NVIDIA GPU, and are not "
        "tested below",
        "a step's memory is the host's, and its peak is not known: peak_memory_bytes is null, --memory_budget needs a "
        "number in place of auto",
        "--load_in_4bit saves memory here as on a GPU; --gradient_checkpointing offload moves nothing, as host and "
        "device are one",
    )
    return [Finding("devices", NOTE, text) for text in texts]


def disk_findings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """The caches with their sizes, whether they can be written, and the room that is left beside them and here."""
    home = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    places = [
        ("tokenised data", default_directory(), "name another --dataset_cache, or set XDG_CACHE_HOME"),
        ("compiled programs (GPU)", compile_cache_directory(), "set JAX_COMPILATION_CACHE_DIR"),
        ("hub", home, "set HF_HOME"),
        ("working directory", Path.cwd(), "runs/ is made here unless --output_dir says otherwise"),
    ]
    for name, path, advice in places:
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        size = "" if name in ("hub", "working directory") else f"{gib(size_of(path))} kept, "
        text = f"{name}: {path}, {size}{gib(free)} free"
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield Finding("cache and disk", NOTE if name == "hub" else FAIL, f"{text}, cannot be written: {advice}")
        elif free < LITTLE_DISK:
            yield Finding("cache and disk", NOTE, f"{text}: that is little; {advice}")
        else:
            yield Finding("cache and disk", OK, text)


def size_of(directory: Path) -> int:
    """Bytes of the files in a directory and below; 0 where it is not there."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else 0


def system_line() -> str:
    return f"jaxft {jaxft.__version__}, Python {platform.python_version()}, {platform.platform()}"


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]
