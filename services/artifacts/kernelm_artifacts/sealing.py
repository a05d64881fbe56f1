"""What the store does with encryption at rest: trees come in encrypted, and are read from copies in memory."""

from pathlib import Path

from kernelm_artifacts.plain import Plain
from kernelm_artifacts.settings import Settings, memory_of
from kernelm_artifacts.store import KEY, SEALED
from kernelm_artifacts.tree import copy_tree, write_durably
from kernelm_artifacts.vault import Vault
from kernelm_sdk.system import Artifact


class Sealing:
    """The vault and the copies of a store. `tree` is always the folder of one artifact."""

    def __init__(self, vault: Vault, plain: Plain) -> None:
        self.vault, self.plain = vault, plain

    @classmethod
    def of(cls, settings: Settings, home: Path) -> "Sealing":
        """As the settings say."""
        return cls(Vault(settings.master), Plain(memory_of(settings, home), settings.plain_mb * 2**20))

    def receive(self, folder: Path, artifact: Artifact, tree: Path) -> None:
        """Encrypt the files in `folder` into `tree`; the key comes last, and with it the tree is a sealed one."""
        key, wrapped = self.vault.new_key(artifact.digest)
        copy_tree(folder, artifact, tree / SEALED, key.writing)
        write_durably(tree / KEY, wrapped, 0o400)

    def open(self, artifact: Artifact, tree: Path, by: str) -> tuple[Path, str, str]:
        """The folder with the decrypted files; the first that is not right, and what is wrong with it."""
        key = self.vault.open_key(artifact.digest, (tree / KEY).read_bytes())
        return self.plain.copy(artifact, lambda name, target: key.restore(tree / SEALED / name, name, target), by)

    def renew(self, digest: str, tree: Path) -> bool:
        """Wrap the key with the newest master key; False if it is already."""
        wrapped = (tree / KEY).read_bytes()
        if self.vault.is_current(wrapped):
            return False
        write_durably(tree / KEY, self.vault.rewrap(digest, wrapped), 0o400)
        return True

    def forget(self, digest: str) -> None:
        """Drop the readable copy."""
        self.plain.drop(digest)
