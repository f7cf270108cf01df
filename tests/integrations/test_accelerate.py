import pytest
import torch

import granet

accelerate = pytest.importorskip("accelerate", reason='needs pip install "granet[accelerate]"')


@pytest.fixture(autouse=True)
def fresh():
    """accelerate keeps its state in the class."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train(problem):
    def run(method="granet", optimizer="sgd", *, clip=None, save=None, load=None, average=None, **options):
        accelerator = accelerate.Accelerator(cpu=True, **options)
        model = problem.network(seed=1 if load else 0)
        sparsifier = granet.Sparsifier(model, problem.method(method), seed=1 if load else 7)
        optimizer = problem.optimizer(model, optimizer)
        model, optimizer, loader = accelerator.prepare(model, optimizer, problem.loader())
        sparsifier.attach(optimizer)  # what prepare() returned is unwrapped
        averaged = average and average(accelerator.unwrap_model(model))
        if averaged:
            sparsifier.follow(averaged)
        accelerator.register_for_checkpointing(sparsifier)
        done = 0
        if load:
            accelerator.load_state(load)
            done = sparsifier.step
            loader = accelerator.skip_first_batches(loader, done)
        for step, (x, y) in enumerate(loader, done + 1):
            with accelerator.accumulate(model):
                accelerator.backward(model(x, y)["loss"])
                if clip and accelerator.sync_gradients:
                    clip(accelerator, sparsifier, model)
                optimizer.step()
                optimizer.zero_grad()
            if averaged:
                averaged.update_parameters(accelerator.unwrap_model(model))
            if save and step == 10:
                accelerator.save_state(save)
        return averaged.module if averaged else sparsifier.model, sparsifier

    return run


@pytest.mark.parametrize(("method", "optimizer"), [("granet", "sgd"), ("rigl", "adamw")])
def test_equals_the_plain_loop(method, optimizer, problem, train, same):
    same(*train(method, optimizer), *problem.plain(method, optimizer)[:2])


def test_accumulation_equals_the_plain_loop(problem, train, same):
    model, sparsifier = train(
        gradient_accumulation_steps=2
    )  # hooks are called once for a step, not for each of its batches
    same(model, sparsifier, *problem.plain(accumulate=2)[:2])
    assert sparsifier.step == problem.steps // 2


def test_autocast_equals_the_plain_loop(problem, train, same):
    same(*train(mixed_precision="bf16"), *problem.plain(autocast=torch.bfloat16)[:2])


def test_accelerate_clips_by_dense_gradients_and_the_sparsifier_by_live_ones(train, clips):
    by = {
        "stack": lambda accelerator, sparsifier, model: accelerator.clip_grad_norm_(model.parameters(), 0.03),
        "sparsifier": lambda accelerator, sparsifier, model: sparsifier.clip_grad_norm_(0.03),
    }

    def trained(who):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        return train(clip=by[who])

    clips(trained)


def test_an_average_is_followed(problem, train, same):
    averaged, sparsifier = train(average=problem.average)
    same(averaged, sparsifier, *problem.plain(average=problem.average)[:2])
    assert not torch.equal(averaged.net[0].weight, sparsifier.model.net[0].weight)


def test_compiled_equals_the_plain_loop(problem, train, same, compiles):
    same(*train(dynamo_backend=compiles), *problem.plain()[:2])


@pytest.mark.parametrize(("method", "optimizer"), [("granet", "sgd"), ("rigl", "adamw")])
def test_resume_is_bitwise(method, optimizer, train, same, tmp_path):
    whole = train(method, optimizer, save=str(tmp_path / "saved"))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    same(*train(method, optimizer, load=str(tmp_path / "saved")), *whole)


def test_masks_follow_a_model_that_is_moved_before_attach(problem):
    """To another device, which prepare() does, or another memory layout."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 4, 3))
    sparsifier = granet.Sparsifier(model, problem.method())
    model.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    sparsifier.attach(problem.optimizer(model))
    for name, mask in sparsifier.masks.items():
        weight = dict(model.named_parameters())[name]
        assert mask.device == weight.device and mask.stride() == weight.stride() != (36, 9, 3, 1)
