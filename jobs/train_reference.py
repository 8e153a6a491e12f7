"""Train the embedded reference model: python -m jobs.train_reference [steps=6000 output=stun/reference ...]"""

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from stun.reference.train import TrainConfig, train

ConfigStore.instance().store(name="train_reference", node=TrainConfig)


@hydra.main(version_base="1.3", config_path=None, config_name="train_reference")
def main(cfg) -> None:
    train(OmegaConf.to_object(cfg))


if __name__ == "__main__":
    main()
