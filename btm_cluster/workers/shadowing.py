"""Modules of the user's own that shadow a library's, such as a folder `datasets`
with an `__init__.py` beside the plan.

Workers import from nowhere that a plan lies (`on_ray/cluster.py`), except from what PYTHONPATH names. A job
that is submitted with its working directory has that on it.
"""

import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from btm_cluster.errors import UserError

# fmt: off
LIBRARIES = frozenset((
    "accelerate", "aiohttp", "attr", "boto3", "botocore", "click", "datasets", "dill", "filelock", "fsspec",
    "google", "grpc", "httpx", "huggingface_hub", "jinja2", "jsonschema", "markupsafe", "msgpack",
    "multiprocess", "networkx", "numpy", "packaging", "pandas", "psutil", "pyarrow", "pydantic", "ray",
    "regex", "requests", "rich", "s3transfer", "safetensors", "scipy", "sklearn", "sympy", "tensorboardX",
    "tokenizers", "torch", "tqdm", "transformers", "typer", "typing_extensions", "urllib3", "xxhash",
    "yaml",
))
# fmt: on
"""Modules that a run imports sooner or later, of our dependencies and of theirs."""


def check_shadowing() -> None:
    """Refuses a current folder that is on PYTHONPATH and hides a library:
    everything after would fail in odd ways.

    Raises:
        UserError: naming the modules.
    """
    folder, given = Path.cwd(), os.environ.get("PYTHONPATH")
    if not given or folder.resolve() not in {Path(entry).resolve() for entry in given.split(os.pathsep)}:
        return
    hidden = [path.name for path in shadowing_modules(folder)]
    if hidden:
        raise UserError(
            f"modules of your own hide libraries that a run needs, since PYTHONPATH names {folder}",
            found=", ".join(hidden),
            expected="no module of a library's name in a folder on PYTHONPATH, where `ray job submit "
            "--working-dir` puts its own",
            remedy="rename them, name them in .rayignore, or submit from a folder that has the plan and its "
            "texts alone",
        )


def shadowing_modules(folder: Path) -> Iterator[Path]:
    """The files and folders there that Python would import in the place of a
    library or of a module of its own in use."""
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != folder.resolve()]
    own = frozenset(sys.modules) & sys.stdlib_module_names - frozenset(sys.builtin_module_names)
    for name in sorted(LIBRARIES | own):
        spec = PathFinder.find_spec(name, [str(folder)])
        if spec is None or spec.origin is None:  # a folder without `__init__.py` hides nothing
            continue
        if name in own or PathFinder.find_spec(name, elsewhere) is not None:
            file = Path(spec.origin)
            yield file.parent if file.stem == "__init__" else file
