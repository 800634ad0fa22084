"""Gets a process ready to train, before there is anything to train on."""

import gc

import torch

from btm_cluster.data.blocks import Blocks
from btm_cluster.language_model.compute import device_of
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.training_spec import TextBlocks
from btm_cluster.language_model.training_state import build_state
from btm_cluster.language_model.update import Updates
from btm_cluster.requests import TrainRequest
from btm_cluster.steps.settling import settled
from btm_cluster.steps.training_run import set_up, spec_of


def warm_up(request: TrainRequest) -> None:
    """Imports all that a training needs, opens its GPU, and compiles its passes by
    made-up blocks; on a CPU, imports alone.

    The training then finds them compiled, since torch keeps what it has compiled for any model of the same
    shape. It changes no result.
    """
    if not request.how.gpus_per_worker or request.pretrained is not None:
        return
    group = ProcessGroup.joined(device_of(request.how.gpus_per_worker))
    texts = [TextBlocks(text.name, Blocks([])) for text in request.texts]
    spec = spec_of(settled(request, group), texts, first_token=0)
    set_up(spec.compute)
    Updates(spec, build_state(spec, group), group).try_out()
    gc.collect()
    torch.cuda.empty_cache()
