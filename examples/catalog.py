"""docs/catalog.md: personas, questions and users from Python, and a catalog through the reference's layout and back."""

from pathlib import Path
from tempfile import TemporaryDirectory

from persona_axis import load_catalog
from persona_axis.catalog.reference import export_reference, import_reference

catalog = load_catalog()  # or a folder of your own
print(catalog.role("pirate").prompts[4])
dramatic = catalog.trait("dramatic")
print(f"{dramatic.name}: {dramatic.pairs[1].positive}\n{dramatic.opposite}: {dramatic.pairs[1].negative}")
print([role.name for role in catalog.select_roles(6)])  # one from each group; always the same six
script = next(script for script in catalog.scripts if script.domain == "coding")
print(f"{script.user} says: {script.messages[0]}")
with TemporaryDirectory() as folder:
    print(export_reference(catalog, Path(folder) / "reference"))
    print(import_reference(Path(folder) / "reference", Path(folder) / "catalog"))
    print(load_catalog(Path(folder) / "catalog").role("pirate") == catalog.role("pirate"))
