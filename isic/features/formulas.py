"""Features that read only their own row, as a table: name, expression, group, source."""

import math
from dataclasses import dataclass
from types import MappingProxyType

import polars as pl

from isic import schema

ERR = 1e-5
"""Replaces a denominator of zero; the notebooks add it to denominators."""

NOTEBOOKS = "public ISIC 2024 notebooks"
SOLUTIONS = "high-placed ISIC 2024 solutions"
OURS = "this project"

ROW_GROUPS = ("numeric", "category", "formula")

CATEGORY_BLANK = "blank"
SITE = "anatom_site_general"
LOCATION = "tbp_lv_location"


@dataclass(frozen=True)
class Feature:
    """One column of the feature table."""

    name: str
    expr: pl.Expr
    """Reads metadata columns; a relative feature reads row features and the patient code."""
    group: str
    source: str

    @property
    def relative(self) -> bool:
        """Whether the value depends on the patient's other lesions."""
        return self.group not in ROW_GROUPS


def ratio(numerator: pl.Expr, denominator: pl.Expr) -> pl.Expr:
    """Return numerator / denominator; a denominator of exactly 0 is ERR, so 0/0 is 0."""
    # The notebooks compute with numpy, so 0/0 and x/0 become NaN and infinity. Here a formula is
    # blank only if one of its columns is.
    return numerator / pl.when(denominator == 0).then(ERR).otherwise(denominator)


def norm(*parts: pl.Expr) -> pl.Expr:
    return sum((part * part for part in parts), start=pl.lit(0.0)).sqrt()


def _tbp(name: str) -> pl.Expr:
    return pl.col(f"tbp_lv_{name}")


age = pl.col("age_approx")
size = pl.col("clin_size_long_diam_mm")
a = _tbp("A")
a_ext = _tbp("Aext")
b = _tbp("B")
b_ext = _tbp("Bext")
hue = _tbp("H")
hue_ext = _tbp("Hext")
lum = _tbp("L")
lum_ext = _tbp("Lext")
delta_a = _tbp("deltaA")
delta_b = _tbp("deltaB")
delta_l = _tbp("deltaL")
delta_lb = _tbp("deltaLBnorm")
area = _tbp("areaMM2")
perim = _tbp("perimeterMM")
minor = _tbp("minorAxisMM")
area_perim = _tbp("area_perim_ratio")
ecc = _tbp("eccentricity")
nevi = _tbp("nevi_confidence")
border = _tbp("norm_border")
color = _tbp("norm_color")
symm = _tbp("symm_2axis")
color_std = _tbp("color_std_mean")
radial = _tbp("radial_color_std_max")
std_l = _tbp("stdL")
std_l_ext = _tbp("stdLExt")
x = _tbp("x")
y = _tbp("y")
z = _tbp("z")

# For logarithms and roots, whose NaN would blank the z-scores of a whole patient.
possible_area = pl.when(area >= 0).then(area)
border_complexity = border + symm
shape_index = ratio(area, perim * perim)

NOTEBOOK_FORMULAS = MappingProxyType(
    {
        "lesion_size_ratio": ratio(minor, size),
        "lesion_shape_index": shape_index,
        "hue_contrast": (hue - hue_ext).abs(),
        "luminance_contrast": (lum - lum_ext).abs(),
        "lesion_color_difference": norm(delta_a, delta_b, delta_l),
        "border_complexity": border_complexity,
        "color_uniformity": color_std / (radial + ERR),
        "position_distance_3d": norm(x, y, z),
        "perimeter_to_area_ratio": ratio(perim, area),
        "area_to_perimeter_ratio": ratio(area, perim),
        "lesion_visibility_score": delta_lb + color,
        "symmetry_border_consistency": symm * border,
        "consistency_symmetry_border": ratio(symm * border, symm + border),
        "color_consistency": ratio(std_l, lum_ext),
        "consistency_color": ratio(std_l * lum_ext, std_l + lum_ext),
        "size_age_interaction": size * age,
        "hue_color_std_interaction": hue * color_std,
        "lesion_severity_index": (border + color + ecc) / 3,
        "shape_complexity_index": border_complexity + shape_index,
        "color_contrast_index": delta_a + delta_b + delta_l + delta_lb,
        "log_lesion_area": (possible_area + 1).log(),
        "normalized_lesion_size": ratio(size, age),
        "mean_hue_difference": (hue + hue_ext) / 2,
        "std_dev_contrast": norm(delta_a, delta_b, delta_l) / math.sqrt(3),
        "color_shape_composite_index": (color_std + area_perim + symm) / 3,
        "lesion_orientation_3d": pl.arctan2(y, x),
        "overall_color_difference": (delta_a + delta_b + delta_l) / 3,
        "symmetry_perimeter_interaction": symm * perim,
        "comprehensive_lesion_index": (area_perim + ecc + color + symm) / 4,
        "color_variance_ratio": ratio(color_std, std_l_ext),
        "border_color_interaction": border * color,
        "border_color_interaction_2": ratio(border * color, border + color),
        "size_color_contrast_ratio": ratio(size, delta_lb),
        "age_normalized_nevi_confidence": ratio(nevi, age),
        "age_normalized_nevi_confidence_2": norm(size, age),
        "color_asymmetry_index": radial * symm,
        "volume_approximation_3d": area * norm(x, y, z),
        "color_range": (lum - lum_ext).abs() + (a - a_ext).abs() + (b - b_ext).abs(),
        "shape_color_consistency": ecc * color_std,
        "border_length_ratio": ratio(perim, 2 * (math.pi * possible_area).sqrt()),
        "age_size_symmetry_index": age * size * symm,
        "index_age_size_symmetry": age * area * symm,
    }
)
"""The 42 numeric formulas of the public notebooks, under the notebooks' names."""

SOLUTION_FORMULAS = MappingProxyType(
    {
        "asymmetry_ratio": ratio(symm, perim),
        "asymmetry_area_ratio": ratio(symm, area),
        "color_variation_intensity": color * delta_lb,
        "color_contrast_ratio": ratio(delta_lb, lum),
        "border_density": ratio(border, perim),
        "area_diameter_ratio": ratio(area, size * size),
        "position_angle_xz": pl.arctan2(z, x),
        "texture_contrast": ratio(std_l, lum),
    }
)
"""Formulas of high-placed solutions; their shape_irregularity is border_length_ratio."""

COMBINED_SITE = "combined_anatomical_site"
CATEGORIES = (*schema.CATEGORICAL, COMBINED_SITE)
"""Text columns; `encoding` turns them into codes."""

_combined_site = pl.concat_str(
    pl.col(SITE).fill_null(CATEGORY_BLANK), pl.lit("_"), pl.col(LOCATION).fill_null(CATEGORY_BLANK)
)

ROW_FEATURES = (
    *(Feature(name, pl.col(name), "numeric", "raw") for name in schema.NUMERIC),
    *(Feature(name, pl.col(name), "category", "raw") for name in schema.CATEGORICAL),
    *(Feature(name, expr, "formula", NOTEBOOKS) for name, expr in NOTEBOOK_FORMULAS.items()),
    Feature(COMBINED_SITE, _combined_site, "formula", NOTEBOOKS),
    *(Feature(name, expr, "formula", SOLUTIONS) for name, expr in SOLUTION_FORMULAS.items()),
    Feature(
        "num_blanks",
        pl.sum_horizontal(*(pl.col(name).is_null() for name in schema.NUMERIC)),
        "formula",
        OURS,
    ),
)

ROW_NUMERIC = tuple(
    f.name for f in ROW_FEATURES if f.name not in CATEGORIES and f.name != "num_blanks"
)
"""The 84 numbers that also get a z-score among the patient's lesions."""
