"""What a notebook may be told.

A notebook's parameter cell holds literals; the next cell hands them to :func:`read`, which refuses unknown names.
papermill itself only warns about a misspelt parameter and then runs the default.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, field_validator

from defectlib import paths, profiles
from defectlib.profiles import Grid, Profile, SplitRule, Strict

MIN_TILE = 16


class Parameters(Strict):
    """The parameters of every notebook. ``None`` asks the profile, the category file or the data set.

    ``tiles`` reads square crops: a side in px, "auto" (the median defect covers four latent cells) or "none".
    ``variants`` are those of the profile that are run beside the methods; [] is none of them. ``grid = "full"`` covers
    all categories and defects instead of the profile's first ones. ``foregrounds`` is a folder of the user's own masks
    of the objects, one for each shot and training normal, named as the image with ".png".
    """

    profile: str | None = None
    dataset: str = "mini"
    data_root: str | None = None
    category: str | None = None
    defects: list[str] | None = None
    methods: list[str] | None = None
    variants: list[str] | None = None
    seeds: list[int] | None = None
    split: SplitRule | None = None
    tiles: int | Literal["auto", "none"] | None = None
    grid: Literal["full"] | None = None
    prompts: dict[str, str] = {}
    foregrounds: str | None = None
    runs_root: str | None = None
    figures_root: str | None = None

    @field_validator("tiles", mode="before")
    @classmethod
    def _tiles(cls, value: Any) -> Any:
        """One sentence for all that is wrong; pydantic has one for each member of a union."""
        if value in (None, "auto", "none") or (isinstance(value, int) and value >= MIN_TILE):
            return value
        raise ValueError(f"'{value}' is neither a side of {MIN_TILE} px or more, nor auto, nor none")

    @property
    def profile_name(self) -> str:
        """The profile: as given, else ``DEFECTLIB_PROFILE``, else smoke."""
        return self.profile or os.environ.get("DEFECTLIB_PROFILE") or "smoke"

    def settings(self) -> Profile:
        """The profile's values, with the split rule, the grid and the variants replaced where they were given.

        Raises:
            ValueError: A variant that is none of the profile's, or of a method that is not asked for.
        """
        settings = profiles.load(self.profile_name)
        changes: dict[str, Any] = {}
        if self.split is not None:
            changes["data"] = settings.data.model_copy(update={"split": self.split})
        if self.grid == "full":
            changes["grid"] = Grid(categories=None, defects=None)
        if self.variants is not None:
            known = settings.variants_of(settings.asked(self.methods))
            if unknown := [name for name in self.variants if name not in known]:
                raise ValueError(
                    f"variants: the profile {settings.profile} has no '{unknown[0]}' of the methods asked for; it has: "
                    f"{', '.join(known) or 'none'}"
                )
            changes["variants"] = {name: settings.variants[name] for name in known if name in self.variants}
        return settings.model_copy(update=changes)

    def dataset_folder(self) -> Path:
        """``runs/<profile>[+<split>]/<dataset>``: the split joins the name where it is not the profile's own."""
        settings = self.settings()
        own = profiles.load(self.profile_name).data.split == settings.data.split
        name = self.profile_name if own else f"{self.profile_name}+{settings.data.split}"
        return Path(self.runs_root or paths.RUNS) / name / self.dataset

    def notebooks_folder(self) -> Path:
        """Where executed notebooks and their receipts lie."""
        return self.dataset_folder() / "notebooks"

    def figures_folder(self) -> Path:
        """Where notebooks draw and the report writes: beside the runs, unless told otherwise.

        ``figures/``, which is in git, is filled by ``report.build.report`` alone.
        """
        return Path(self.figures_root or self.dataset_folder() / "figures")


def category_file(dataset: str, category: str) -> Path:
    """Where the prompts of a category stand."""
    return paths.PARAMS / dataset / f"{category}.yaml"


def load_category(dataset: str, category: str) -> Parameters | None:
    """The parameters of a shipped category file, or None where there is none (a user's own folder)."""
    path = category_file(dataset, category)
    return validate(profiles.load_yaml(path), str(path)) if path.is_file() else None


def validate(values: dict[str, Any], source: str = "parameters") -> Parameters:
    """Check plain values against :class:`Parameters`; ValueError names each wrong or unknown one."""
    try:
        return Parameters(**values)
    except ValidationError as error:
        raise profiles.explain(error, source, list(Parameters.model_fields)) from error


def read(namespace: dict[str, Any]) -> Parameters:
    """Validate what a notebook's parameter cells defined: call as ``params.read(globals())`` in the cell after them.

    Every public literal in the namespace counts as a parameter, so a misspelt name injected by papermill is refused.
    """
    plain = (str, int, float, bool, type(None), list, dict)
    hidden = {"In", "Out"}
    values = {k: v for k, v in namespace.items() if not k.startswith("_") and k not in hidden and isinstance(v, plain)}
    return validate(values, "notebook parameters")


def prompt(parameters: Parameters, category: str, defect: str) -> str:
    """The text prompt of a defect: as given, else from the category file, else "a <category> with a <defect>"."""
    if defect in parameters.prompts:
        return parameters.prompts[defect]
    shipped = load_category(parameters.dataset, category)
    if shipped is not None and defect in shipped.prompts:
        return shipped.prompts[defect]
    return f"a {category} with a {defect}".replace("_", " ")
