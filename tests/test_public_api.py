"""The public names are what they say, in whatever order they are imported."""

import subprocess
import sys

import persona_axis


def test_no_public_name_is_shadowed_by_a_module() -> None:
    order = "Policy", "steer", "cap", "run", "load_model"  # Policy imports the package that steer lives in
    code = (
        f"from persona_axis import {', '.join(order)}\n"
        "import types\n"
        f"shadowed = [n for n in {order} if isinstance(globals()[n], types.ModuleType)]\n"
        "assert not shadowed, shadowed"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import persona_axis, sys; assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_documented() -> None:
    for name in persona_axis.__all__:
        assert (getattr(persona_axis, name).__doc__ or "").strip(), name
