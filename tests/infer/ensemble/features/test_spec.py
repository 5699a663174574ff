from pathlib import Path

import pytest

from isic.runtime.errors import UserError
from tests.support.ensembles import fit_small


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("lesion_id", "lesion_id exists only in the training table"),
        ("engineerd", 'did you mean "engineered"'),
        ("multimodl", 'did you mean "multimodal"'),
        ("multimodal", "need --embeddings"),
        ("image", "need --embeddings"),
        ("raw,aligned", "need --embeddings"),
        ("raw,frozen", "need --frozen"),
    ],
)
def test_bad_features_are_refused(data: Path, tmp_path: Path, features: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_small(data, tmp_path, features=features)
