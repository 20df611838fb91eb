"""Where files come from: a given directory, the cache, a system package, or a verified download."""

import hashlib
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path.home() / ".cache" / "apoptorch"


@dataclass(frozen=True)
class Source:
    """A published data set: its files with their MD5 sums (checked after a download), and where they may be.

    `name` is what people call it, `folder` its directory in the cache, `url` what a file's name is appended to.
    """

    name: str
    folder: str
    files: Mapping[str, str]
    url: str
    debian: str | None = None

    def directory(self, path: str | Path | None) -> Path:
        """The directory that holds all files: `path`, or the first that has them; if none has, they are downloaded.

        Raises:
            FileNotFoundError: they are nowhere, or what was downloaded has the wrong checksum.
        """
        folders = self._folders() if path is None else (Path(path).expanduser(),)
        for folder in folders:
            if all((folder / name).is_file() for name in self.files):
                return folder
        try:
            if path is None:
                return self._download()
            problem = f"got {path}, which lacks some of {', '.join(self.files)}"
        except OSError as error:
            problem = f"found none of them (the download failed: {error})"
        package = f", in Debian's package {self.debian} (/usr/share/datasets)" if self.debian else ""
        install = f", or `apt-get install {self.debian}`" if self.debian else ""
        raise FileNotFoundError(
            f"{self.name} must be in a directory passed as `path`, in the cache {CACHE / self.folder}{package} or at "
            f"{self.url}; {problem}. Put {', '.join(self.files)} into the cache{install}."
        )

    def _folders(self) -> Sequence[Path]:
        debian = [Path("/usr/share/datasets") / self.folder] if self.debian else []
        return [CACHE / self.folder, *debian]

    def _download(self) -> Path:
        folder = CACHE / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, md5 in self.files.items():
            with urllib.request.urlopen(self.url + name, timeout=60) as response:
                content = response.read()
            if hashlib.md5(content).hexdigest() != md5:
                raise OSError(f"the checksum of {name} is wrong")
            (folder / name).write_bytes(content)
        return folder
