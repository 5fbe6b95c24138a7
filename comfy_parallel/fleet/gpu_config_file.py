"""Where `gpu_config.json` is kept: read when it has changed, written as a whole or not at all."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from comfy_parallel.core.gpu_config import GpuConfig, parse, parse_text
from comfy_parallel.errors import ConfigError

MOST_BYTES = 1 << 20
OFF = "off"


def named_file(name: str | None, usual: Path) -> GpuConfigFile | None:
    """The file that COMFY_PARALLEL_GPU_CONFIG names, else the `usual` one; none where it says `off`."""
    if name == OFF:
        return None
    return GpuConfigFile(Path(os.path.abspath(Path(name).expanduser())) if name else usual)


class GpuConfigFile:
    """The file at `path`; one that is not there is an empty configuration. Any thread may use it.

    What another program has written to it is seen the next time that it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._read: tuple[tuple[int, int, int], GpuConfig] | None = None

    def read(self) -> GpuConfig:
        """What it says now.

        Raises:
            ConfigError: when it cannot be read, or is no configuration.
        """
        with self._lock:
            return self._current()

    def change(self, change: Callable[[GpuConfig], GpuConfig]) -> GpuConfig:
        """Write what `change` makes of what it says now, and return it.

        Raises:
            ConfigError: nothing was written.
        """
        with self._lock:
            changed = change(self._current())
            self._write(changed.text())
            self._read = None
            return changed

    def _current(self) -> GpuConfig:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return parse({})
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from error
        version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._read is None or self._read[0] != version:
            self._read = version, self._parsed(stat.st_size)
        return self._read[1]

    def _parsed(self, size: int) -> GpuConfig:
        if size > MOST_BYTES:
            raise ConfigError(f"{self.path} has {size} bytes, which is no gpu_config.json; move it away")
        try:
            return parse_text(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path} is not written in UTF-8: {error.reason}; save it again as UTF-8") from error
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error

    def _write(self, text: str) -> None:
        """A reader sees the old file or the new one, also after a crash; who may read it stays as it was."""
        path = self.path.resolve()  # A link to the file stays a link.
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        except OSError as error:
            raise self._not_written(error) from error
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                os.chmod(temporary, path.stat().st_mode & 0o777)
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.path} cannot be written: {error.strerror}; let ComfyUI's user write there, or name another file "
            "with COMFY_PARALLEL_GPU_CONFIG"
        )
