"""Published marginals, counts and correlations of the challenge's 401,059 training rows.

Aggregates only; the module contains no row of the real data.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

FULL_ROWS = 401_059
FULL_POSITIVES = 393
FULL_PATIENTS = 1_042
FULL_POSITIVE_PATIENTS = 259

# One row of the whole table: the minimum and the maximum.
_TAIL = 1 / FULL_ROWS
KNOT_PERCENT = (
    100 * _TAIL,
    1,
    5,
    10,
    25,
    30,
    40,
    50,
    60,
    70,
    80,
    85,
    90,
    95,
    99,
    100 - 100 * _TAIL,
)
"""Percentiles of `KNOTS`. The outermost two are the minimum and the maximum."""

KNOTS: dict[str, tuple[float, ...]] = {
    "age_approx": (
        *(5, 30, 35, 40, 50, 50, 55, 60),
        *(60, 65, 70, 75, 75, 80, 85, 85),
    ),
    "clin_size_long_diam_mm": (
        *(1, 2.4336, 2.57, 2.6, 2.84, 2.91, 3.12, 3.37),
        *(3.68, 4.1, 4.73, 5.21, 5.93, 7.3, 10.95, 28.4),
    ),
    "tbp_lv_eccentricity": (
        *(0.027667, 0.32306, 0.4462, 0.53874, 0.65663, 0.68376, 0.72919, 0.76821),
        *(0.80325, 0.83673, 0.86967, 0.88653, 0.9044, 0.92451, 0.94594, 0.97496),
    ),
    "tbp_lv_area_perim_ratio": (
        *(10.762, 13.366, 14.024, 14.393, 15.426, 15.769, 16.528, 17.424),
        *(18.556, 20.064, 22.203, 23.738, 25.942, 29.882, 39.416, 87.205),
    ),
    "tbp_lv_Lext": (
        *(17.702, 24.633, 31.611, 34.959, 42.275, 44.24, 47.89, 51.426),
        *(54.951, 58.586, 62.47, 64.606, 67.015, 70.198, 75.626, 98.588),
    ),
    "tbp_lv_deltaL": (
        *(-38.756, -20.792, -15.711, -13.679, -10.675, -10.031, -8.9799, -8.1322),
        *(-7.3964, -6.7255, -6.0524, -5.6823, -5.2577, -4.7177, -3.9183, -1.5906),
    ),
    "tbp_lv_Aext": (
        *(-9.0803, 7.5052, 9.5285, 10.568, 12.47, 12.96, 13.852, 14.714),
        *(15.613, 16.584, 17.745, 18.472, 19.439, 21.006, 24.353, 37.022),
    ),
    "tbp_lv_deltaA": (
        *(-13.82, 0.61325, 1.7898, 2.4355, 3.4131, 3.6594, 4.1406, 4.6439),
        *(5.2079, 5.8831, 6.7357, 7.3041, 8.0618, 9.3305, 14.523, 32.138),
    ),
    "tbp_lv_Bext": (
        *(9.2371, 17.652, 19.934, 21.378, 23.848, 24.475, 25.621, 26.702),
        *(27.79, 28.995, 30.468, 31.428, 32.698, 34.778, 38.743, 48.373),
    ),
    "tbp_lv_deltaB": (
        *(-18.088, -4.5912, -2.4844, -1.5159, 0.11103, 0.47011, 1.0785, 1.5939),
        *(2.0732, 2.5757, 3.1538, 3.5053, 3.9542, 4.6163, 5.8479, 12.644),
    ),
    "tbp_lv_color_std_mean": (
        *(0, 0, 0, 0.26906, 0.57491, 0.64692, 0.78687, 0.9314),
        *(1.0933, 1.2908, 1.5601, 1.7481, 2.014, 2.4808, 3.6655, 9.9529),
    ),
    "tbp_lv_norm_color": (
        *(0, 0, 0, 0.73444, 1.7288, 1.9468, 2.3537, 2.7647),
        *(3.2251, 3.7789, 4.5279, 5.0527, 5.7984, 7.1046, 9.7135, 10),
    ),
    "tbp_lv_radial_color_std_max": (
        *(0, 0, 0, 0.17841, 0.56389, 0.63818, 0.77092, 0.90228),
        *(1.0494, 1.2253, 1.4655, 1.6376, 1.884, 2.3359, 3.5255, 11.491),
    ),
    "tbp_lv_stdL": (
        *(0.26816, 0.68671, 0.91943, 1.0829, 1.4566, 1.5812, 1.8575, 2.1867),
        *(2.5958, 3.1348, 3.8933, 4.4263, 5.1332, 6.2609, 8.5805, 17.564),
    ),
    "tbp_lv_stdLExt": (
        *(0.63625, 1.2733, 1.4631, 1.5915, 1.8347, 1.9001, 2.0246, 2.1498),
        *(2.2837, 2.439, 2.6404, 2.7737, 2.9606, 3.2808, 4.1838, 25.535),
    ),
    "tbp_lv_norm_border": (
        *(0.58943, 1.2028, 1.4746, 1.6845, 2.1438, 2.2934, 2.6201, 2.9969),
        *(3.4554, 4.0183, 4.758, 5.2523, 5.9124, 6.9655, 8.8547, 10),
    ),
    "tbp_lv_symm_2axis": (
        *(0.052034, 0.11601, 0.14286, 0.16667, 0.21143, 0.225, 0.25234, 0.2823),
        *(0.31667, 0.35758, 0.40952, 0.44253, 0.48497, 0.54802, 0.66053, 0.97706),
    ),
    "tbp_lv_nevi_confidence": (
        *(0, 2.0444e-10, 1.978e-05, 0.000646, 0.10982, 0.34422, 2.5835, 14.409),
        *(47.358, 79.177, 93.123, 96.339, 98.336, 99.488, 99.959, 100),
    ),
    "tbp_lv_dnn_lesion_confidence": (
        *(5.45054e-07, 54.9141, 76.4428, 94.1995, 99.7148, 99.777, 99.8894, 99.9944),
        *(99.9965, 99.9987, 100, 100, 100, 100, 100, 100),
    ),
    "tbp_lv_symm_2axis_angle": (
        *(0, 0, 0, 10, 40, 50, 70, 90),
        *(105, 120, 140, 150, 160, 170, 175, 175),
    ),
    "tbp_lv_x": (
        *(-624.87, -416.11, -327.26, -251.64, -147.02, -119.87, -63.918, -5.7473),
        *(53.144, 111.45, 169.71, 204.79, 250.89, 329.09, 437.65, 614.47),
    ),
    "tbp_lv_y": (
        *(-1052.1, 74.98, 263.26, 351.63, 746.52, 949.23, 1087.8, 1172.8),
        *(1243.3, 1309, 1377.2, 1414.4, 1456.5, 1514.7, 1617.6, 1887.8),
    ),
    "tbp_lv_z": (
        *(-291.89, -148.11, -103.44, -70.786, -8.9626, 8.8673, 40.618, 67.958),
        *(93.648, 116.07, 137.21, 148.09, 160.7, 177.62, 208.28, 319.41),
    ),
}
"""Values of a numeric column at KNOT_PERCENT; at 1 % and 5 % of 1,413 benign rows only."""

SIDE_PX = (
    (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100),
    (51, 93, 105, 109, 118, 130, 139, 147, 157, 181, 239),
)
"""Side of a crop: percents, and its percentiles in pixels."""

RANK_CORRELATION: dict[str, tuple[int, ...]] = {
    "age_approx": (),
    "clin_size_long_diam_mm": (-1,),
    "tbp_lv_eccentricity": (11, 7),
    "tbp_lv_area_perim_ratio": (25, 41, 49),
    "tbp_lv_Lext": (-15, -5, -10, -26),
    "tbp_lv_deltaL": (15, -19, 30, 46, -53),
    "tbp_lv_Aext": (14, -13, 10, 17, 7, 9),
    "tbp_lv_deltaA": (-26, 3, -22, -43, 48, -55, -21),
    "tbp_lv_Bext": (-8, -5, 2, -9, 40, -19, 34, 24),
    "tbp_lv_deltaB": (-15, -18, 1, -16, 35, 8, -12, 34, 21),
    "tbp_lv_color_std_mean": (-11, 51, -40, -24, 20, -64, -17, 34, 2, -17),
    "tbp_lv_norm_color": (-10, 50, -42, -25, 21, -63, -16, 32, 3, -17, 98),
    "tbp_lv_radial_color_std_max": (-8, 46, -42, -25, 21, -59, -15, 29, 4, -17, 93, 98),
    "tbp_lv_stdL": (-12, 23, -34, -42, 36, -90, -13, 47, 13, -11, 76, 74, 70),
    "tbp_lv_stdLExt": (26, 20, 6, 31, 18, -22, 22, -7, 3, -25, 15, 16, 16, 12),
    "tbp_lv_norm_border": (27, 12, 47, 90, -25, 55, 21, -46, -7, -10, -40, -40, -39, -52, 25),
    "tbp_lv_symm_2axis": (25, -11, 38, 71, -22, 55, 22, -42, -4, -5, -49, -49, -47, -53, 18, 94),
    "tbp_lv_nevi_confidence": (
        -33,
        19,
        -34,
        -50,
        17,
        -58,
        -27,
        45,
        8,
        16,
        48,
        46,
        43,
        59,
        -22,
        -61,
        -61,
    ),
    "tbp_lv_dnn_lesion_confidence": (
        -29,
        -9,
        -45,
        -63,
        33,
        -49,
        -10,
        55,
        25,
        33,
        33,
        32,
        31,
        46,
        -39,
        -64,
        -57,
        62,
    ),
}
"""Rank correlations, in percent, of each column with those above it (645 benign rows)."""

# Measured, but raised for the columns of the cue relative to the patient: deltaL, deltaA, deltaB,
# stdL and nevi_confidence.
PATIENT_SHARE: dict[str, float] = {
    "age_approx": 1.0,
    "tbp_lv_area_perim_ratio": 0.18,
    "tbp_lv_Lext": 0.44,
    "tbp_lv_deltaL": 0.45,
    "tbp_lv_Aext": 0.31,
    "tbp_lv_deltaA": 0.75,
    "tbp_lv_Bext": 0.41,
    "tbp_lv_deltaB": 0.80,
    "tbp_lv_stdL": 0.45,
    "tbp_lv_stdLExt": 0.40,
    "tbp_lv_norm_border": 0.15,
    "tbp_lv_symm_2axis": 0.11,
    "tbp_lv_nevi_confidence": 0.75,
    "tbp_lv_dnn_lesion_confidence": 0.24,
}
"""Share of a column's variance that is between patients; nearly 0 for other columns."""

ZERO_COLOR = 0.085
"""Share of rows with color_std_mean, norm_color and radial_color_std_max equal to 0."""

BLANKS: dict[str, float] = {"sex": 0.0287, "age_approx": 0.0070}
"""Share of rows in which a column is blank. The site is blank if the location is Unknown."""

LOCATIONS: dict[str, tuple[int, float, float, float]] = {
    "Head & Neck": (12_046, 0, 1594, -43),
    "Left Arm": (1_593, -300, 1240, 60),
    "Left Arm - Lower": (11_939, -390, 1100, 0),
    "Left Arm - Upper": (22_816, -300, 1340, 75),
    "Left Leg": (1_974, -200, 400, 60),
    "Left Leg - Lower": (27_428, -215, 295, 75),
    "Left Leg - Upper": (23_673, -180, 610, 20),
    "Right Arm": (601, 300, 1240, 60),
    "Right Arm - Lower": (10_636, 390, 1090, 0),
    "Right Arm - Upper": (22_972, 290, 1340, 60),
    "Right Leg": (1_711, 200, 400, 60),
    "Right Leg - Lower": (25_208, 210, 290, 85),
    "Right Leg - Upper": (23_034, 160, 620, 25),
    "Torso Back": (9, 0, 1200, 140),
    "Torso Back Bottom Third": (4_596, 0, 940, 150),
    "Torso Back Middle Third": (46_185, 0, 1140, 140),
    "Torso Back Top Third": (71_112, -10, 1385, 138),
    "Torso Front": (60, 0, 1200, -40),
    "Torso Front Bottom Half": (24_360, 0, 1060, -55),
    "Torso Front Top Half": (63_350, 0, 1355, -32),
    "Unknown": (5_756, 0, 700, 26),
}
"""By `tbp_lv_location`: rows of the full table, and x, y, z of its centre in mm, rounded."""

SITES: dict[str, str | None] = {
    "Head & Neck": "head/neck",
    "Left Arm": "upper extremity",
    "Right Arm": "upper extremity",
    "Left Leg": "lower extremity",
    "Right Leg": "lower extremity",
    "Torso Back": "posterior torso",
    "Torso Front": "anterior torso",
    "Unknown": None,
}
"""`anatom_site_general` by `tbp_lv_location_simple`, with which a location begins."""

SEX = {"male": 265_546, "female": 123_996}

MSKCC = "Memorial Sloan Kettering Cancer Center"
BARCELONA = "Department of Dermatology, Hospital Clínic de Barcelona"
BASEL = "University Hospital of Basel"
UQ = "Frazer Institute, The University of Queensland, Dermatology Research Centre"
ACEMID = "ACEMID MIA"
VIENNA = "ViDIR Group, Department of Dermatology, Medical University of Vienna"
ATHENS = (
    "Department of Dermatology, University of Athens, "
    "Andreas Syggros Hospital of Skin and Venereal Diseases, "
    "Alexander Stratigos, Konstantinos Liopyris"
)
UNSEEN = "Department of Dermatology, Stand-in University Hospital"

ATTRIBUTIONS: dict[str, tuple[int, str, float]] = {
    MSKCC: (129_068, "CC-BY", 0.86),
    BARCELONA: (105_724, "CC-BY-NC", 0.0),
    BASEL: (65_218, "CC-BY-NC", 0.0),
    UQ: (51_768, "CC-BY", 0.08),
    ACEMID: (28_665, "CC-0", 0.0),
    VIENNA: (12_640, "CC-BY-NC", 0.0),
    ATHENS: (7_976, "CC-BY", 0.0),
}
"""By attribution: rows, licence, share of `3D: white` tiles; the other tiles are `3D: XP`."""

UNSEEN_ATTRIBUTION = (40_000, "CC-BY", 0.0)
"""The same for UNSEEN, which occurs only in the test split."""

LESION_ID_BENIGN = 0.054
"""Share of benign rows with a `lesion_id`."""
BIOPSIED_BENIGN = 0.0017
"""Share of benign rows with a diagnosis finer than Benign."""

Diagnosis = tuple[str | None, str | None, str | None, str | None]

MELANOMA = "Malignant melanocytic proliferations (Melanoma)"
BASAL = "Malignant adnexal epithelial proliferations - Follicular"
SQUAMOUS = "Malignant epidermal proliferations"
NEVUS = "Benign melanocytic proliferations"
INVASIVE = "Melanoma Invasive"

MALIGNANT_DIAGNOSES: dict[Diagnosis, int] = {
    ("Malignant", BASAL, "Basal cell carcinoma", "Basal cell carcinoma, Nodular"): 92,
    ("Malignant", BASAL, "Basal cell carcinoma", "Basal cell carcinoma, Superficial"): 60,
    ("Malignant", BASAL, "Basal cell carcinoma", None): 11,
    ("Malignant", SQUAMOUS, "Squamous cell carcinoma in situ", None): 50,
    ("Malignant", SQUAMOUS, "Squamous cell carcinoma, Invasive", None): 23,
    ("Malignant", MELANOMA, "Melanoma in situ", None): 60,
    ("Malignant", MELANOMA, "Melanoma in situ", "Melanoma in situ, associated with a nevus"): 25,
    ("Malignant", MELANOMA, INVASIVE, "Melanoma Invasive, Superficial spreading"): 40,
    ("Malignant", MELANOMA, INVASIVE, None): 32,
}
"""`iddx_1` to `iddx_4` of malignant rows, and their approximate frequency."""

BENIGN_DIAGNOSES: dict[Diagnosis, int] = {
    ("Benign", NEVUS, "Nevus", "Nevus, Atypical, Dysplastic, or Clark"): 50,
    ("Benign", NEVUS, "Nevus", "Nevus, NOS, Junctional"): 20,
    ("Benign", "Benign epidermal proliferations", "Lichen planus like keratosis", None): 15,
    ("Benign", "Benign soft tissue proliferations - Fibro-histiocytic", "Dermatofibroma", None): 5,
}
"""The same for biopsied benign rows; other benign rows have `Benign` only."""

MITOSES = {"<1/mm^2": 28, "0/mm^2": 6, "1/mm^2": 4, "3/mm^2": 4, "4/mm^2": 2}
THICKNESS_MM = (0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.6, 0.8, 1.4, 2.4)
"""Mitotic index and thickness, known only for invasive melanomas."""


def quantile(column: str, z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Map standard normal values [N] to values with the published marginal of `column`.

    Linear between percentiles on the normal scale, on which the tails are nearly straight.
    """
    knot_z = ndtri(np.asarray(KNOT_PERCENT) / 100)
    return np.interp(z, knot_z, KNOTS[column])


def correlation() -> NDArray[np.float64]:
    """Return the correlations of RANK_CORRELATION as a positive definite matrix [K, K]."""
    size = len(RANK_CORRELATION)
    matrix = np.eye(size)
    for row, below in enumerate(RANK_CORRELATION.values()):
        correlations = np.asarray(below) / 100
        matrix[row, :row] = correlations
        matrix[:row, row] = correlations
    return matrix
