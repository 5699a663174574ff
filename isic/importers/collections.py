"""The collections that can be imported, as data: files, columns, diagnoses, sites, licences."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["Malignant", "Indeterminate", "Benign"]
"""The first level of the challenge's `iddx_full`; only Malignant is target 1."""


@dataclass(frozen=True)
class Diagnosis:
    """A diagnosis in the words of its collection."""

    name: str
    kind: Kind


@dataclass(frozen=True)
class Table:
    """A table of a collection. Its file is found by name, at any depth."""

    names: tuple[str, ...]
    """Names under which it has been published."""
    key: str
    """Column of the image's name."""
    columns: tuple[str, ...]
    """Columns that the import reads and that it therefore must have."""
    optional_columns: tuple[str, ...] = ()
    """Other columns that it has been published with; the note on columns left out skips them."""


@dataclass(frozen=True)
class Collection:
    """How a collection is published, and the meaning of its columns and values."""

    title: str
    url: str
    licence: str
    """As `copyright_license` of the challenge names licences."""
    tables: tuple[Table, ...]
    """The first one has a row per image."""
    image_folders: tuple[str, ...]
    """Folders that its archives unpack to. Without them the whole source is searched."""
    image_type: str
    diagnosis: str | tuple[str, ...]
    """A column of codes, or columns that are 1 for the diagnosis of the row."""
    diagnoses: Mapping[str, Diagnosis]
    source_of_kinds: str
    """The publication that says which diagnoses are malignant."""
    columns: Mapping[str, str]
    """Columns of the challenge's table, by the collection's."""
    attribution: str
    """Of every image."""
    attribution_by: Mapping[str, str] = field(default_factory=dict)
    """Other attributions, by the start of the value of `attribution_column`."""
    attribution_column: str | None = None
    target: str | None = None
    """A column that is the target, if the collection has one; else the diagnosis decides."""
    sites: Mapping[str, str | None] = field(default_factory=dict)
    """`anatom_site_general` by the collection's words in lower case; others stay as they are."""
    group: str = "lesion_id"
    """Column of the challenge's table that becomes `patient_id`: images that may not be split."""
    mask_folder: str | None = None
    mask_ending: str = "_segmentation.png"


VIENNA = "ViDIR Group, Department of Dermatology, Medical University of Vienna"
ROSENDAHL = "Cliff Rosendahl, School of Medicine, The University of Queensland"
BARCELONA = "Department of Dermatology, Hospital Clínic de Barcelona"
MSKCC = "Memorial Sloan Kettering Cancer Center"

NEVUS = Diagnosis("Nevus", "Benign")
MELANOMA = Diagnosis("Melanoma", "Malignant")
BCC = Diagnosis("Basal cell carcinoma", "Malignant")
SCC = Diagnosis("Squamous cell carcinoma", "Malignant")
ACTINIC = Diagnosis("Actinic keratosis", "Indeterminate")
"""As in the challenge: indeterminate, target 0."""
AKIEC = Diagnosis("Actinic keratosis or intraepithelial carcinoma", "Malignant")
"""One class with Bowen's disease, a carcinoma in situ."""
BKL = Diagnosis("Benign keratosis", "Benign")
DF = Diagnosis("Dermatofibroma", "Benign")
VASC = Diagnosis("Vascular lesion", "Benign")

SEVEN = {
    "MEL": MELANOMA,
    "NV": NEVUS,
    "BCC": BCC,
    "AKIEC": AKIEC,
    "BKL": BKL,
    "DF": DF,
    "VASC": VASC,
}
"""The seven classes of HAM10000 and ISIC 2018."""

HAM_SITES: dict[str, str | None] = {
    "abdomen": "anterior torso",
    "acral": "palms/soles",
    "back": "posterior torso",
    "chest": "anterior torso",
    "ear": "head/neck",
    "face": "head/neck",
    "foot": "lower extremity",
    "genital": "oral/genital",
    "hand": "upper extremity",
    "lower extremity": "lower extremity",
    "neck": "head/neck",
    "scalp": "head/neck",
    "trunk": "torso",
    "unknown": None,
    "upper extremity": "upper extremity",
}
ISIC_SITES: dict[str, str | None] = {
    name: name
    for name in (
        *("anterior torso", "head/neck", "lateral torso", "lower extremity", "oral/genital"),
        *("palms/soles", "posterior torso", "torso", "upper extremity"),
    )
}
PAD_SITES: dict[str, str | None] = {
    "abdomen": "anterior torso",
    "arm": "upper extremity",
    "back": "posterior torso",
    "chest": "anterior torso",
    "ear": "head/neck",
    "face": "head/neck",
    "foot": "lower extremity",
    "forearm": "upper extremity",
    "hand": "upper extremity",
    "leg": "lower extremity",
    "lip": "head/neck",
    "neck": "head/neck",
    "nose": "head/neck",
    "scalp": "head/neck",
    "shin": "lower extremity",
    "thigh": "lower extremity",
}

TSCHANDL = "Tschandl, Rosendahl, Kittler (2018), doi:10.1038/sdata.2018.161"

COLLECTIONS: dict[str, Collection] = {
    "ham10000": Collection(
        title="HAM10000",
        url="https://doi.org/10.7910/DVN/DBW86T",
        licence="CC-BY-NC",
        tables=(
            Table(
                ("HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata"),
                key="image_id",
                columns=("lesion_id", "dx", "age", "sex", "localization"),
                optional_columns=("dataset", "dx_type"),
            ),
        ),
        image_folders=("HAM10000_images_part_1", "HAM10000_images_part_2"),
        image_type="dermoscopic",
        diagnosis="dx",
        diagnoses={code.lower(): diagnosis for code, diagnosis in SEVEN.items()},
        source_of_kinds=TSCHANDL,
        columns={
            "lesion_id": "lesion_id",
            "age_approx": "age",
            "sex": "sex",
            "anatom_site_general": "localization",
        },
        attribution=VIENNA,
        attribution_by={"rosendahl": ROSENDAHL},
        attribution_column="dataset",
        sites=HAM_SITES,
        mask_folder="HAM10000_segmentations_lesion_tschandl",
    ),
    "isic2018": Collection(
        title="ISIC 2018 Challenge, task 3",
        url="https://challenge.isic-archive.com/data/#2018",
        licence="CC-BY-NC",
        tables=(
            Table(
                ("ISIC2018_Task3_Training_GroundTruth.csv",),
                key="image",
                columns=tuple(SEVEN),
            ),
            Table(
                ("ISIC2018_Task3_Training_LesionGroupings.csv",),
                key="image",
                columns=("lesion_id",),
                optional_columns=("diagnosis_confirm_type",),
            ),
        ),
        image_folders=("ISIC2018_Task3_Training_Input",),
        image_type="dermoscopic",
        diagnosis=tuple(SEVEN),
        diagnoses=SEVEN,
        source_of_kinds=TSCHANDL,
        columns={"lesion_id": "lesion_id"},
        attribution=VIENNA,
        mask_folder="ISIC2018_Task1_Training_GroundTruth",
    ),
    "isic2019": Collection(
        title="ISIC 2019 Challenge",
        url="https://challenge.isic-archive.com/data/#2019",
        licence="CC-BY-NC",
        tables=(
            Table(
                ("ISIC_2019_Training_GroundTruth.csv",),
                key="image",
                columns=("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"),
                optional_columns=("UNK",),
            ),
            Table(
                ("ISIC_2019_Training_Metadata.csv",),
                key="image",
                columns=("age_approx", "anatom_site_general", "lesion_id", "sex"),
            ),
        ),
        image_folders=("ISIC_2019_Training_Input",),
        image_type="dermoscopic",
        diagnosis=("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"),
        diagnoses={
            "MEL": MELANOMA,
            "NV": NEVUS,
            "BCC": BCC,
            "AK": ACTINIC,
            "BKL": BKL,
            "DF": DF,
            "VASC": VASC,
            "SCC": SCC,
        },
        source_of_kinds="iddx_full of the ISIC 2024 challenge, which has actinic keratosis "
        "as indeterminate",
        columns={
            "lesion_id": "lesion_id",
            "age_approx": "age_approx",
            "sex": "sex",
            "anatom_site_general": "anatom_site_general",
        },
        attribution="ISIC 2019 Challenge",
        attribution_by={"HAM": VIENNA, "BCN": BARCELONA, "MSK": MSKCC},
        attribution_column="lesion_id",
        sites=ISIC_SITES,
    ),
    "isic2020": Collection(
        title="SIIM-ISIC 2020 Challenge",
        url="https://doi.org/10.34970/2020-ds01",
        licence="CC-BY-NC",
        tables=(
            Table(
                # The last one: the files of the competition on Kaggle.
                (
                    "ISIC_2020_Training_GroundTruth_v2.csv",
                    "ISIC_2020_Training_GroundTruth.csv",
                    "train.csv",
                ),
                key="image_name",
                columns=(
                    *("patient_id", "sex", "age_approx", "anatom_site_general_challenge"),
                    *("diagnosis", "benign_malignant", "target"),
                ),
                optional_columns=("lesion_id", "tfrecord", "width", "height"),
            ),
        ),
        image_folders=("ISIC_2020_Training_JPEG", "ISIC_2020_Training_Input", "train"),
        image_type="dermoscopic",
        diagnosis="diagnosis",
        diagnoses={
            "atypical melanocytic proliferation": Diagnosis(
                "Atypical melanocytic proliferation", "Indeterminate"
            ),
            "cafe-au-lait macule": Diagnosis("Cafe-au-lait macule", "Benign"),
            "lentigo NOS": Diagnosis("Lentigo NOS", "Benign"),
            "lichenoid keratosis": Diagnosis("Lichenoid keratosis", "Benign"),
            "melanoma": MELANOMA,
            "nevus": NEVUS,
            "seborrheic keratosis": Diagnosis("Seborrheic keratosis", "Benign"),
            "solar lentigo": Diagnosis("Solar lentigo", "Benign"),
            "unknown": Diagnosis("Unknown benign", "Benign"),
        },
        source_of_kinds="the collection's own column target; "
        "Rotemberg and others (2021), doi:10.1038/s41597-021-00815-z",
        target="target",
        columns={
            "patient_id": "patient_id",
            "lesion_id": "lesion_id",
            "age_approx": "age_approx",
            "sex": "sex",
            "anatom_site_general": "anatom_site_general_challenge",
        },
        attribution="International Skin Imaging Collaboration, SIIM-ISIC 2020 Challenge",
        sites=ISIC_SITES,
        group="patient_id",
    ),
    "pad_ufes_20": Collection(
        title="PAD-UFES-20",
        url="https://doi.org/10.17632/zr7vgbcyr2.1",
        licence="CC-BY",
        tables=(
            Table(
                ("metadata.csv",),
                key="img_id",
                columns=(
                    *("patient_id", "lesion_id", "age", "gender", "region", "diameter_1"),
                    *("diameter_2", "diagnostic"),
                ),
                optional_columns=(
                    *("smoke", "drink", "background_father", "background_mother", "pesticide"),
                    *("skin_cancer_history", "cancer_history", "has_piped_water"),
                    *("has_sewage_system", "fitspatrick", "itch", "grew", "hurt", "changed"),
                    *("bleed", "elevation", "biopsed"),
                ),
            ),
        ),
        image_folders=("imgs_part_1", "imgs_part_2", "imgs_part_3"),
        image_type="clinical: close-up",
        diagnosis="diagnostic",
        diagnoses={
            "ACK": ACTINIC,
            "BCC": BCC,
            "MEL": MELANOMA,
            "NEV": NEVUS,
            "SCC": SCC,
            "SEK": Diagnosis("Seborrheic keratosis", "Benign"),
        },
        source_of_kinds="Pacheco and others (2020), doi:10.1016/j.dib.2020.106221: "
        "BCC, MEL and SCC (with Bowen's disease) are skin cancers",
        columns={
            "patient_id": "patient_id",
            "lesion_id": "lesion_id",
            "age_approx": "age",
            "sex": "gender",
            "anatom_site_general": "region",
        },
        attribution="Federal University of Espírito Santo (PAD-UFES-20)",
        sites=PAD_SITES,
        group="patient_id",
    ),
}
"""By the name that `isic import` takes."""

DIAMETERS = ("diameter_1", "diameter_2")
"""Columns in millimetres, the larger of which is `clin_size_long_diam_mm`, if a table has them."""
