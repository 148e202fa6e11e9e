"""One AdamW step of a flat vector of parameters."""

import numpy as np

from gristmill.bench.protocol import main

RATE, DECAY = 1e-3, 0.01


def vectors(length: int) -> tuple[np.ndarray, np.ndarray]:
    row = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    return np.resize(row, length), np.resize(row[::-1], length)


def torch_step(option):
    def make(threads, length):
        import torch

        torch.set_num_threads(threads)
        values, grads = vectors(length)
        parameter = torch.nn.Parameter(torch.from_numpy(values))
        parameter.grad = torch.from_numpy(grads)
        optimizer = torch.optim.AdamW([parameter], lr=RATE, weight_decay=DECAY, **{option: True})
        optimizer.step()
        for name in ("exp_avg", "exp_avg_sq"):  # in huge pages, as the parameters are
            state = optimizer.state[parameter]
            state[name] = torch.from_numpy(np.array(state[name].numpy()))

        def call():
            optimizer.step()

        return call

    return make


def gristmill(threads, length):
    import gristmill as gm

    values, grads = vectors(length)
    optimizer = gm.AdamW(RATE, weight_decay=DECAY)
    state = {name: np.array(each) for name, each in optimizer.init(length).items()}
    step = 0

    def call():
        nonlocal step
        step += 1
        optimizer.update(values, grads, state, step, threads=threads)

    return call


ENGINES = {"gristmill": gristmill, "torch_fused": torch_step("fused"), "torch_foreach": torch_step("foreach")}

if __name__ == "__main__":
    main(ENGINES)
