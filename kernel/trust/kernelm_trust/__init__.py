"""Signatures of plugins, and the policy that says whose a node runs. Nothing of a plugin is run for it."""

SIGNATURE = "kernelm-plugin.sig"  # at the root of a plugin's files
SBOM = "kernelm-plugin.cdx.json"  # at the root; in a wheel <name>.dist-info/sboms/kernelm-plugin.cdx.json (PEP 770)
