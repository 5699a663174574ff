"""Small folders in the layouts in which collections are published; the pixels are made up."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

ROWS = 16
HEIGHT, WIDTH = 45, 60


def image_bytes(row: int, kind: str) -> bytes:
    """A lesion on skin, redder and darker with the row."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    inside = (y - 22) ** 2 + (x - 30) ** 2 < (8 + row) ** 2
    colours = np.where(inside[..., None], (90 + 4 * row, 60, 50), (220, 180, 160 + row))
    encoded = io.BytesIO()
    PIL.Image.fromarray(colours.astype(np.uint8)).save(encoded, kind)
    return encoded.getvalue()


def mask_bytes() -> bytes:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[14:30, 20:40] = 255
    encoded = io.BytesIO()
    PIL.Image.fromarray(mask).save(encoded, "PNG")
    return encoded.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_table(path: Path, header: str, rows: Iterable[Sequence[object]]) -> None:
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    write(path, "\n".join(lines) + "\n")


def one_hot(row: int, number: int) -> list[str]:
    """Flags as the challenges write them; every second row is the first class."""
    chosen = 0 if row % 2 else row // 2 % number
    return ["1.0" if column == chosen else "0.0" for column in range(number)]


def isic_name(row: int) -> str:
    return f"ISIC_{24306 + row:07d}"


def ham10000(root: Path) -> None:
    codes = ("mel", "nv", "bkl", "mel", "bcc", "df", "vasc", "akiec")
    places = ("scalp", "abdomen", "trunk", "unknown", "back", "acral", "hand", "ear")
    sources = ("vidir_modern", "rosendahl", "vidir_molemax", "vienna_dias")
    write_table(
        root / "HAM10000_metadata.csv",
        "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset",
        (
            (
                f"HAM_{row // 2:07d}",
                isic_name(row),
                codes[row % 8],
                "histo",
                "" if row == 3 else f"{40 + row}.0",
                "unknown" if row == 4 else "female",
                places[row % 8],
                sources[row % 4],
            )
            for row in range(ROWS)
        ),
    )
    for row in range(ROWS):
        part = f"HAM10000_images_part_{1 + row % 2}"
        write(root / part / f"{isic_name(row)}.jpg", image_bytes(row, "JPEG"))
        masks = root / "HAM10000_segmentations_lesion_tschandl"
        write(masks / f"{isic_name(row)}_segmentation.png", mask_bytes())


def isic2018(root: Path) -> None:
    truth = "ISIC2018_Task3_Training_GroundTruth"
    write_table(
        root / truth / f"{truth}.csv",
        "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC",
        ((isic_name(row), *one_hot(row, 7)) for row in range(ROWS)),
    )
    write_table(
        root / "ISIC2018_Task3_Training_LesionGroupings.csv",
        "image,lesion_id,diagnosis_confirm_type",
        ((isic_name(row), f"HAM_{row // 2:07d}", "histopathology") for row in range(ROWS)),
    )
    for row in range(ROWS):
        folder = root / "ISIC2018_Task3_Training_Input"
        write(folder / f"{isic_name(row)}.jpg", image_bytes(row, "JPEG"))
    write(root / "ISIC2018_Task3_Training_Input" / "LICENSE.txt", "CC BY-NC 4.0")
    # Images of task 1 are others, but for a few.
    for name in ("ISIC_0000000", isic_name(2)):
        folder = root / "ISIC2018_Task1_Training_GroundTruth"
        write(folder / f"{name}_segmentation.png", mask_bytes())


def isic2019(root: Path) -> None:
    names = [f"{isic_name(row)}{'_downsampled' * (row == 5)}" for row in range(ROWS)]
    write_table(
        root / "ISIC_2019_Training_GroundTruth.csv",
        "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK",
        ((name, *one_hot(row, 8), "0.0") for row, name in enumerate(names)),
    )
    lesions = [f"HAM_{row:07d}" for row in range(5)] + ["MSK4_0011169", "BCN_0003884", ""]
    sites = ("anterior torso", "oral/genital", "", "lateral torso")
    write_table(
        root / "ISIC_2019_Training_Metadata.csv",
        "image,age_approx,anatom_site_general,lesion_id,sex",
        (
            (name, "" if row == 2 else 55.0, sites[row % 4], lesions[row // 2], "male")
            for row, name in enumerate(names)
        ),
    )
    for row, name in enumerate(names):
        folder = root / "ISIC_2019_Training_Input" / "ISIC_2019_Training_Input"
        write(folder / f"{name}.jpg", image_bytes(row, "JPEG"))


def isic2020(root: Path) -> None:
    diagnoses = ("unknown", "melanoma", "nevus", "melanoma", "lentigo NOS")
    write_table(
        root / "ISIC_2020_Training_GroundTruth_v2.csv",
        "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,"
        "benign_malignant,target",
        (
            (
                f"ISIC_{row:07d}",
                f"IP_{row // 2:07d}",
                f"IL_{row:07d}",
                "" if row == 1 else "male",
                "NA" if row == 2 else "45",
                "" if row == 3 else "torso",
                diagnoses[row % 5],
                "malignant" if diagnoses[row % 5] == "melanoma" else "benign",
                int(diagnoses[row % 5] == "melanoma"),
            )
            for row in range(ROWS)
        ),
    )
    for row in range(ROWS):
        write(root / "train" / f"ISIC_{row:07d}.jpg", image_bytes(row, "JPEG"))


def pad_ufes_20(root: Path) -> None:
    codes = ("BCC", "ACK", "NEV", "SEK", "SCC", "MEL")
    regions = ("ARM", "NECK", "FACE", "THIGH", "BACK")
    rows = []
    for row in range(ROWS):
        name = f"PAT_{row // 2}_{row}_{100 + row}.png"
        known = row % 3 == 0
        # fmt: off
        rows.append(
            (
                f"PAT_{row // 2}", row, *(("False",) * 2 if known else ("",) * 2),
                "POMERANIA" if known else "", "", 30 + row, "", "FEMALE" if known else "",
                "", "", "", "", "3.0" if known else "", regions[row % 5],
                "6.0" if known else "", "5.0" if known else "", codes[row % 6],
                "True", "False", "False", "UNK", "False", "True", name, "True",
            )
        )
        # fmt: on
        part = f"imgs_part_{1 + row % 3}"
        write(root / "images" / part / part / name, image_bytes(row, "PNG"))
    write_table(
        root / "metadata.csv",
        "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,"
        "skin_cancer_history,cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,"
        "diameter_1,diameter_2,diagnostic,itch,grew,hurt,changed,bleed,elevation,img_id,biopsed",
        rows,
    )


WRITERS: dict[str, Callable[[Path], None]] = {
    "ham10000": ham10000,
    "isic2018": isic2018,
    "isic2019": isic2019,
    "isic2020": isic2020,
    "pad_ufes_20": pad_ufes_20,
}
"""By the name of the collection."""
