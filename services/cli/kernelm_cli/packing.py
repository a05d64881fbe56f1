"""`kernelm plugin pack` and `keygen`: a plugin as one file that can be given away, with a bill of materials, and signed.

Neither the plugin's code nor its build backend is run (packed.py).
"""

import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kernelm_cli.session import print_json, stdout

UNSIGNED = "not signed: a node that lists keys (KERNELM_TRUST) refuses it; --key FILE signs it"


def keygen(file: Annotated[Path, Parameter(name="FILE")] = Path("plugin.key"), /, *,
           json: Annotated[bool, Parameter(negative="")] = False) -> int:  # fmt: skip
    """Make a key that signs plugins: FILE, for you alone, and FILE.pub, to be given to whoever shall trust you.

    Parameters
    ----------
    file
        Of the private key.
    json
        Print JSON.
    """
    from kernelm_trust.keys import generate

    fingerprint, public = generate(file), file.with_name(file.name + ".pub")
    if json:
        print_json({"key": str(file), "public": str(public), "fingerprint": fingerprint})
        return 0
    console = stdout()
    console.print(f"private key  {file} (mode 0600: keep it to yourself; it has no passphrase)", highlight=False, soft_wrap=True)
    console.print(f"public key   {public}, fingerprint {fingerprint}", highlight=False, soft_wrap=True)
    console.print(public.read_text().strip(), highlight=False)
    console.print("trust it     put the .pub file into the folder that KERNELM_TRUST names for the node", highlight=False)
    return 0


def pack(path: Annotated[Path, Parameter(name="PATH")], /, *, key: Path | None = None, output: Path = Path("dist"),
         image: Annotated[bool, Parameter(negative="")] = False, base: str = "",
         json: Annotated[bool, Parameter(negative="")] = False) -> int:  # fmt: skip
    """Pack a plugin into one file, with a bill of materials, and sign it. The same files give the same bytes.

    Parameters
    ----------
    path
        The plugin's folder, or a wheel that another tool built.
    key
        Signs it: a private key of `kernelm plugin keygen`.
    output
        The folder that is written to.
    image
        Also make a container image with what the plugin requires, and sign its id with the plugin.
    base
        What the image builds upon: an image's id or name; KERNELM_NODE_IMAGE by default.
    json
        Print JSON.
    """
    from kernelm_cli import image as images  # here, as all below: no other command needs them, and they take half a second
    from kernelm_cli.packed import Packed
    from kernelm_trust.keys import load_signer

    signer = load_signer(key) if key else None
    with tempfile.TemporaryDirectory(prefix="kernelm-pack-") as folder:
        packed = Packed(path, Path(folder))
        packed.output = output / packed.name
        made = images.make(packed.manifest, packed.requirements, packed.parts, base, output) if image else None
        packed.write()
        if signer:
            packed.sign(signer, made.id if made else "")
    signed = signer.public_key.keyid if signer else ""
    if json:
        picture = {"id": made.id, "file": str(made.file)} if made else None
        print_json({"file": str(packed.output), "sha256": packed.digest(), "signer": signed, "components": len(packed.parts),
                    "left_out": packed.left_out, "image": picture})  # fmt: skip
        return 0
    console = stdout()
    unknown = [p.asked for p in packed.parts.values() if not p.version]
    lines = [("packed", f"{packed.output}, {packed.output.stat().st_size:,} bytes, sha256:{packed.digest()}"),
             ("SBOM", f"{len(packed.parts)} components, CycloneDX 1.6"
              + (f"; not installed here, so without a version: {', '.join(unknown)}" if unknown else "")),
             ("signed", f"by key {signed}" if signed else UNSIGNED)]  # fmt: skip
    if packed.left_out:
        lines.insert(1, ("left out", f"{', '.join(packed.left_out)} (a wheel holds packages and modules)"))
    if made:
        lines.append(("image", f"{made.id}, saved as {made.file}"))
        lines.append(("load it", f"kernelm plugin load {packed.output} --runtime container --image {made.id}"))
    for what, text in lines:
        console.print(f"{what:<9} {text}", highlight=False, markup=False, soft_wrap=True)
    return 0
