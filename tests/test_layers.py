"""The shape of the code: arrows never point up, files stay small, and our `kernels/` gets in nobody's way."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCH = "linfusion.kernels.bench"
"""Measures kernels next to hosts and whole models: it lies with the kernels and belongs to the top."""

FOLDERS = {"linfusion": "linfusion"} | {
    name: f"linfusion.{name}" for name in ("kernels", "pipelines", "distill", "demos")
}
"""Folder in the repository -> package that it is installed as."""


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Absolute names of all that a module imports, anywhere in it."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*up, *filter(None, [node.module])))
            # `from .. import describe` names a module as well as `from ..describe import describe`
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_the_parser_sees_imports():
    """The rules below are only worth what this finds."""
    assert len(MODULES) > 25
    assert imports("linfusion.mechanisms.clear") >= {"linfusion.call", "linfusion.kernels", "linfusion.mechanisms.base"}
    assert "linfusion.apply" in imports("linfusion") and "linfusion.describe" in imports("linfusion.cli.generate")
    assert "linfusion.pipelines.generate" in imports("linfusion.cli.generate")
    assert "diffusers.models.attention_dispatch" in imports("linfusion.families.base")


HOSTS = ("diffusers", "transformers", "accelerate", "peft")
CORE = ("linfusion.apply", "linfusion.adapter", "linfusion.weights", "linfusion.describe")
TOP = ("linfusion.cli", "linfusion.pipelines", "linfusion.distill", "linfusion.demos", BENCH)

# layer -> what its modules never import
FORBIDDEN = {
    "linfusion.kernels": ("linfusion.call", "linfusion.mechanisms", "linfusion.families", *CORE, *TOP, *HOSTS),
    "linfusion.call": ("linfusion.mechanisms", "linfusion.families", *CORE, *TOP, *HOSTS),
    "linfusion.mechanisms": ("linfusion.families", *CORE, *TOP, *HOSTS),
    "linfusion.families": (*CORE, *TOP),
    "linfusion.adapter": ("linfusion.apply", "linfusion.weights", "linfusion.describe", *TOP),
    "linfusion.apply": ("linfusion.weights", "linfusion.describe", *TOP),
    "linfusion.weights": TOP,
    "linfusion.describe": TOP,
    "linfusion.pipelines": ("linfusion.cli", "linfusion.demos", "linfusion.distill"),
    "linfusion.distill": ("linfusion.cli", "linfusion.demos"),
    "linfusion.demos": ("linfusion.cli",),
    BENCH: ("linfusion.cli", "linfusion.pipelines", "linfusion.distill", "linfusion.demos"),
}


def layer_of(name: str, layer: str) -> bool:
    return under(name, layer) and (layer == BENCH or not under(name, BENCH))


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_arrows_never_point_up(layer):
    members = [name for name in MODULES if layer_of(name, layer)]
    assert members
    wrong = [
        f"{name} imports {target}"
        for name in members
        for target in imports(name)
        for package in FORBIDDEN[layer]
        if under(target, package)
    ]
    assert not wrong


def test_kernels_import_nothing_of_linfusion_but_kernels():
    for name in MODULES:
        if layer_of(name, "linfusion.kernels"):
            ours = {t for t in imports(name) if under(t, "linfusion")}
            assert all(under(t, "linfusion.kernels") for t in ours), name


def test_nothing_imports_the_command_line():
    users = [n for n in MODULES if any(under(t, "linfusion.cli") for t in imports(n)) and not under(n, "linfusion.cli")]
    assert users in ([], ["linfusion.__main__"])


def words(source: str) -> set[str]:
    """Every identifier, keyword and string of a module; texts that stand by themselves (docstrings) left out."""
    tree, found = ast.parse(source), set()
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        named = [getattr(node, field, None) for field in ("id", "attr", "name", "asname", "arg", "module")]
        found |= {name for name in named if isinstance(name, str)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            found.add(node.value)
    return found


def mentions(source: str, names: set[str]) -> set[str]:
    """Which names stand in a module's words: as they are or in lower case, alone or as a part (`SD3Block`, `sd3_x`)."""
    return {
        name
        for name in names
        for word in words(source)
        if re.search(rf"(?<![A-Za-z0-9]){name}(?![a-z0-9])|(?<![A-Za-z0-9]){name.lower()}(?![A-Za-z0-9])", word)
    }


def family_names() -> set[str]:
    """Model classes, their names without what all models have, their stock processors, and layers' own names."""
    import linfusion as lf

    names = {"UNet", "ControlNet", "Qwen", "Hunyuan", "LTX", "Lumina", "Transformer2DModel"}
    names |= {"BasicTransformerBlock", "diffusers", "attn1", "attn2", "transformer_blocks", "to_q", "to_k", "to_v"}
    for model, family in lf.families().items():
        shorter = re.split("Transformer|ControlNet|2D|3D|Model|Motion|SpatioTemporal", model)[0]
        names |= {model, *family.stock, *family.processors, shorter} - {""}
    return names


def mechanism_names() -> set[str]:
    """Config classes, modules, and names on disk; `linfusion` is the package's and the child's name as well."""
    import linfusion as lf

    configs = lf.mechanisms()
    modules = {f"{c.__name__}Attention" for c in configs.values()}
    return {c.__name__ for c in configs.values()} - {"LinFusion"} | modules | set(configs) - {"linfusion"}


def test_mentions_are_found():
    """The two rules below are only worth what this finds."""
    for said in ('x == "FluxTransformer2DModel"', "import sd3", "SD3Block()", "a.flux_layers", "f(unet=1)", "{'WAN'}"):
        assert mentions(said.replace("WAN", "Wan"), family_names()), said
    for said in (
        'c.name == "clear"',
        "type(m).__name__ == 'SLA'",
        "CLEAR(2)",
        "from m import lit",
        "f('use LiT() here')",
    ):
        assert mentions(said, mechanism_names()), said
    assert not mentions('"""Flux."""\nclass A:\n    x = 1\n    """As SD3 has it."""\n', family_names())
    assert not mentions("wanted, fluxes = united, clearly\nagents = reagent", family_names() | mechanism_names())
    assert {"Flux", "SD3", "Wan", "UNet", "DiT", "PixArt", "ZImage", "FluxAttnProcessor"} <= family_names()


def test_mechanisms_know_no_family_by_name():
    """Nor the other way round: N + M, not N x M."""
    for name, path in MODULES.items():
        if under(name, "linfusion.mechanisms"):
            assert not mentions(path.read_text(), family_names()), name


def test_families_know_no_mechanism_by_name():
    import linfusion as lf

    settings = {f.name for c in lf.mechanisms().values() for f in dataclasses.fields(c)}
    for name, path in MODULES.items():
        if not under(name, "linfusion.families"):
            continue
        source = path.read_text()
        found = mentions(source, mechanism_names()) | ({"LinFusion"} & words(source))
        assert not found, name
        read = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and is_config(n.value)]
        assert not {n.attr for n in read} & settings, name  # `mechanism.config.radius`
        ours = {t for t in imports(name) if under(t, "linfusion.mechanisms")}
        assert ours <= {"linfusion.mechanisms"}, name


def is_config(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "config"


def names_used(path: Path) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}


def test_no_file_is_long():
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 600}
    assert not long


def test_no_print_in_library_code():
    """Results are returned, remarks are logged; only the command line and scripts speak."""
    speakers = ("linfusion.cli", "linfusion.demos.train_teacher", "linfusion.demos.train_students")
    for name, path in MODULES.items():
        if not any(under(name, s) for s in speakers):
            assert "print" not in names_used(path), name


def test_everything_is_packaged():
    """A package that pyproject.toml forgets would be missing from the wheel."""
    listed = (ROOT / "pyproject.toml").read_text()
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            assert f'"{name}"' in listed, name


# the kernels trap: Hugging Face has a package of that name, which diffusers and transformers look for


def python(code: str, *path: Path, cwd: Path = ROOT) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parity
def test_hosts_import_from_the_repository_root():
    """`python -c` puts the current folder first on the path."""
    inherited = [Path(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    code = "import transformers, diffusers, diffusers.models.attention_dispatch\n"
    code += "from diffusers import FluxTransformer2DModel\nimport linfusion.kernels as k; print(k.__name__)"
    assert python(code, *inherited) == "linfusion.kernels"


@pytest.fixture
def second_checkout(tmp_path) -> Path:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__", "bench"))
    shutil.copytree(ROOT / "linfusion", tmp_path / "linfusion", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_two_checkouts_do_not_send_each_other_round(second_checkout):
    """Whoever asks for `kernels` gets a bare version where the real one is not installed; ours stays importable."""
    code = "import kernels; print(getattr(kernels, '__version__', None), hasattr(kernels, 'window_attention'))\n"
    for path in ([ROOT, second_checkout], [second_checkout, ROOT]):
        assert python(code, *path) == "0 False"
    code += "import linfusion.kernels as k; print(k.__name__)"
    assert python(code, ROOT, second_checkout) == "0 False\nlinfusion.kernels"


def test_the_real_kernels_is_handed_over(second_checkout, tmp_path_factory):
    """Installed further down the path, it is what `import kernels` gives."""
    site = tmp_path_factory.mktemp("site")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("from .inner import get_kernel\n__version__ = '9.9'\n")
    (site / "kernels" / "inner.py").write_text("def get_kernel(name): return name\n")
    code = "import kernels, sys; from kernels import get_kernel; import kernels.inner\n"
    code += "print(kernels.__version__, get_kernel('x'), sys.modules['kernels'] is kernels)"
    assert python(code, ROOT, second_checkout, site) == "9.9 x True"
