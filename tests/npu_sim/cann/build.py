"""Compiles the libraries of the simulated CANN."""

import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))

# All are the same library to the loader: libnpusim.so, which they need and which has the symbols.
CANN_NAMES = (
    "acl_op_compiler",
    "acl_tdt_channel",
    "ascendcl",
    "ge_runner",
    "graph",
    "hccl",
    "hcomm",
    "nnopbase",
)


def build_into(folder: Path, scratch: Path) -> None:
    """Makes a folder with the libraries; `scratch` is for what lies on the way."""
    folder.mkdir()
    torch, cann = SITE_PACKAGES / "torch", SITE_PACKAGES / "torch_npu/include"
    include = [SOURCES, cann / "third_party/acl/inc", cann / "third_party/hccl/inc", cann]
    include_torch = [torch / "include", torch / "include/torch/csrc/api/include"]
    run_path = "-Wl,-rpath,$ORIGIN"
    needs_npusim = ["-Wl,--no-as-needed", f"-L{folder}", "-lnpusim", run_path]
    needs_torch = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]

    def compile_(name: str, *, standard: str = "c++17", level: str = "-O2") -> Path:
        source = scratch / name if (scratch / name).exists() else SOURCES / name
        output = scratch / f"{source.stem}.o"
        # PyTorch's headers are "system" so that their warnings are not ours.
        includes = [f"-I{path}" for path in include] + [f"-isystem{path}" for path in include_torch]
        flags = [f"-std={standard}", level, "-fPIC", "-fvisibility=hidden"]
        warnings = ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]
        run("g++", *flags, *warnings, *includes, "-c", source, "-o", output)
        return output

    def link(name: str, *arguments: str | Path) -> None:
        output = folder / f"lib{name}.so"
        run("g++", "-shared", *arguments, f"-Wl,-soname,lib{name}.so", "-o", output)

    def build_operators() -> None:
        operators = compile_("operators.cpp", standard="c++20", level="-O1")
        (scratch / "missing.cpp").write_text(_missing_operators(operators))
        missing = compile_("missing.cpp", level="-O0")
        built_core.result()
        link("opapi", operators, missing, *needs_npusim, *needs_torch)

    def build_core() -> None:
        objects = [compile_(name) for name in ("runtime.cpp", "hccl.cpp", "faults.cpp")]
        link("npusim", *objects, "-lpthread")
        for name in CANN_NAMES:
            link(name, *needs_npusim)
        link("atb", compile_("atb.cpp"), *needs_npusim)
        fallback = compile_("fallback.cpp", standard="c++20", level="-O1")
        link("npusim_fallback", fallback, *needs_torch)

    with ThreadPoolExecutor(2) as pool:
        built_core = pool.submit(build_core)
        built_operators = pool.submit(build_operators)
        built_core.result()
        built_operators.result()


def _missing_operators(implemented: Path) -> str:
    """Returns C++ with a function for each operator that torch_npu may call and we do not have."""
    libraries = (SITE_PACKAGES / "torch_npu/lib").glob("*.so")
    wanted = {
        name.decode().removesuffix("GetWorkspaceSize")
        for library in libraries
        for name in re.findall(rb"\baclnn[A-Z]\w*", library.read_bytes())
    }
    missing = sorted(wanted - symbols(implemented, "--defined-only"))
    functions = (
        f'API int {name}() {{ npusim::missing("{name}"); }}\n'
        f'API int {name}GetWorkspaceSize() {{ npusim::missing("{name}"); }}\n'
        for name in missing
    )
    return '#include "npusim.h"\n' + "".join(functions)


def symbols(library: Path, *options: str) -> set[str]:
    """Returns the names in a library's dynamic symbol table or in an object file."""
    dynamic = ["--dynamic"] if library.suffix == ".so" else []
    lines = run("nm", "--portability", *dynamic, *options, library).splitlines()
    return {line.split()[0].split("@")[0] for line in lines}


def run(*command: str | Path) -> str:
    """Returns what a command prints; raises with it if the command fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout
