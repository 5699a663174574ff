"""`python -m train --config vit_tiny`: trains the folds of a config."""

from isic import cli
from train.config import TrainSettings, load_settings
from train.data import load_data
from train.loop import train_fold
from train.outputs import is_finished, print_scores


def train(settings: TrainSettings) -> None:
    """Trains one fold or all of a config into <output_dir>/<name>/fold_<k>.

    --config (or --model_config) names a file in configs/ or a path; every key of it is a flag as well.
    """
    folds = range(settings.num_folds) if settings.fold is None else [settings.fold]
    due = [fold for fold in folds if settings.force or not is_finished(settings, fold)]
    for fold in sorted(set(folds) - set(due)):
        print(f"fold {fold} is finished; --force trains it again")
    if due:
        data = load_data(settings)
        for fold in due:
            train_fold(settings, data, fold)
    print_scores(settings)


if __name__ == "__main__":
    cli.run(train, load_settings)
