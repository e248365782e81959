"""How many drawn scenes a set keeps, in a process and in a loader's worker."""

import pickle

import torch

from widefield.data import Scenes


class Kept(torch.utils.data.Dataset):
    """For each index, the bytes that a set keeps after its scene was read."""

    def __init__(self, scenes):
        self.scenes = scenes

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        self.scenes[index]
        return sum(pixels.nbytes + seen.nbytes for pixels, seen, _ in self.scenes._kept.values())


def test_workers_of_a_loader_keep_few_scenes():
    scenes = Scenes("val", size=1024, count=13, objects=(1, 1), clutter=0)
    in_worker = [int(kept) for kept in torch.utils.data.DataLoader(Kept(scenes), num_workers=1, batch_size=None)]
    assert 0 < max(in_worker) <= 2**26
    assert scenes._kept == {}
    in_process = [Kept(scenes)[index] for index in range(13)]
    assert in_process[-1] == 13 * 5 * 1024**2 > 2**26
    assert len(pickle.dumps(scenes)) < 10_000  # as a spawned worker gets it
    copied = pickle.loads(pickle.dumps(scenes))
    assert torch.equal(scenes[12]["image"], copied[12]["image"])
