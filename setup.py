"""Put the notebooks into the wheel, because they lie beside the package and not in it. pyproject.toml has the rest."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNotebooks(build_py):
    """Copy notebooks/ to turbo_nb/assets/notebooks/. An editable install uses the folder itself."""

    def run(self) -> None:
        """Build the package and copy the notebooks."""
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "turbo_nb/assets/notebooks")
            self.mkpath(str(folder))
            for path in sorted(Path("notebooks").glob("*.ipynb")):
                self.copy_file(str(path), str(folder / path.name))


setup(cmdclass={"build_py": BuildWithNotebooks})
