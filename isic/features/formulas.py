"""Features that need nothing but their own row, as a table: name, expression, group, source.

The public notebooks write their formulas with numpy and let 0/0 and x/0 become NaN and infinity. Here every division
goes through `ratio`, so a formula is blank exactly where one of its own columns is.
"""

import math
from dataclasses import dataclass
from types import MappingProxyType

import polars as pl

from isic import schema

ERR = 1e-5
"""What a denominator of zero becomes, and what the notebooks add where they guard one."""

NOTEBOOKS = "public ISIC 2024 notebooks"
SOLUTIONS = "high-placed ISIC 2024 solutions"
OURS = "this project"

CATEGORY_BLANK = "blank"
SITE = "anatom_site_general"
LOCATION = "tbp_lv_location"


@dataclass(frozen=True)
class Feature:
    """One column of the feature table."""

    name: str
    expr: pl.Expr
    """Over the metadata's columns, or over those and the row features where the group is a relative one."""
    group: str
    source: str


def ratio(numerator: pl.Expr, denominator: pl.Expr) -> pl.Expr:
    """Returns numerator / denominator, with ERR in the place of a denominator of exactly zero; 0/0 is 0."""
    return numerator / pl.when(denominator == 0).then(ERR).otherwise(denominator)


def norm(*parts: pl.Expr) -> pl.Expr:
    """Returns the Euclidean norm of the parts."""
    return sum((part * part for part in parts), start=pl.lit(0.0)).sqrt()


age, size = pl.col("age_approx"), pl.col("clin_size_long_diam_mm")
a, a_ext, b, b_ext = (pl.col(f"tbp_lv_{name}") for name in ("A", "Aext", "B", "Bext"))
hue, hue_ext, lum, lum_ext = (pl.col(f"tbp_lv_{name}") for name in ("H", "Hext", "L", "Lext"))
delta_a, delta_b, delta_l, delta_lb = (
    pl.col(f"tbp_lv_delta{name}") for name in ("A", "B", "L", "LBnorm")
)
area, perim, minor = (
    pl.col(f"tbp_lv_{name}MM{power}")
    for name, power in (("area", 2), ("perimeter", ""), ("minorAxis", ""))
)
possible_area = pl.when(area >= 0).then(area)
"""What a logarithm or a root takes: one NaN would blank all of a patient's lesions that are measured against it."""
area_perim, ecc, nevi = (
    pl.col(f"tbp_lv_{name}") for name in ("area_perim_ratio", "eccentricity", "nevi_confidence")
)
border, color, symm = (
    pl.col(f"tbp_lv_{name}") for name in ("norm_border", "norm_color", "symm_2axis")
)
color_std, radial = pl.col("tbp_lv_color_std_mean"), pl.col("tbp_lv_radial_color_std_max")
std_l, std_l_ext = pl.col("tbp_lv_stdL"), pl.col("tbp_lv_stdLExt")
x, y, z = (pl.col(f"tbp_lv_{name}") for name in "xyz")

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
"""The 42 numeric formulas of the public notebooks, under their names there."""

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
"""Further formulas of high-placed solutions. Their shape_irregularity is border_length_ratio in other letters."""

COMBINED_SITE = "combined_anatomical_site"
CATEGORIES = (*schema.CATEGORICAL, COMBINED_SITE)
"""The columns of text; whoever fits turns them into codes."""

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
"""The 84 numbers that are also looked at relative to the patient's other lesions."""
