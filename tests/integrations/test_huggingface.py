import pytest
import torch

import granet

transformers = pytest.importorskip("transformers", reason='needs pip install "granet[huggingface]"')
pytest.importorskip("accelerate", reason='needs pip install "granet[huggingface]"')

from granet.integrations.huggingface import FILE, SparseTraining  # noqa: E402  after the skip

QUIET = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
    "num_train_epochs": 1,
    "max_grad_norm": 0,
}


@pytest.fixture
def train(problem, tmp_path):
    def run(method="granet", optimizer="sgd", *, folder="out", resume=None, max_norm=None, callbacks=(), **arguments):
        model = problem.network(seed=1 if resume else 0)  # a resumed run takes nothing from the new model
        sparsifier = granet.Sparsifier(model, problem.method(method), seed=1 if resume else 7)
        arguments = QUIET | {"per_device_train_batch_size": problem.batch} | arguments
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(str(tmp_path / folder), **arguments),
            train_dataset=problem.dicts,
            eval_dataset=problem.dicts[:64],
            optimizers=(problem.optimizer(model, optimizer), None),
            callbacks=[SparseTraining(sparsifier, max_norm=max_norm), *callbacks],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, sparsifier, trainer

    return run


@pytest.mark.parametrize(("method", "optimizer"), [("granet", "sgd"), ("rigl", "adamw")])
def test_equals_the_plain_loop(method, optimizer, problem, train, same):
    model, sparsifier, _ = train(method, optimizer)
    same(model, sparsifier, *problem.plain(method, optimizer)[:2])


def test_accumulation_equals_the_plain_loop(problem, train, same):
    model, sparsifier, _ = train(gradient_accumulation_steps=2)
    same(model, sparsifier, *problem.plain(accumulate=2)[:2])


def test_autocast_equals_the_plain_loop(problem, train, same):
    model, sparsifier, _ = train(bf16=True)
    same(model, sparsifier, *problem.plain(autocast=torch.bfloat16)[:2])


def test_the_trainer_clips_by_dense_gradients_and_the_callback_by_live_ones(problem, train, same):
    def dense(sparsifier, model):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.03)

    def live(sparsifier, model):
        sparsifier.clip_grad_norm_(0.03)

    by_trainer, first, _ = train(max_grad_norm=0.03)
    same(by_trainer, first, *problem.plain(clip=dense)[:2])
    by_callback, second, _ = train(max_norm=0.03)
    same(by_callback, second, *problem.plain(clip=live)[:2])
    assert not torch.equal(by_trainer.net[0].weight, by_callback.net[0].weight)
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        train(max_norm=0.03, max_grad_norm=1.0)


class Torchs(transformers.Trainer):
    """With the plain loop's optimizer, which a Trainer with model_init cannot be given."""

    def create_optimizer(self):
        self.optimizer = self.optimizer or torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        return self.optimizer


@pytest.fixture
def search(problem, tmp_path):
    def make(sparse, **arguments):
        return Torchs(
            args=transformers.TrainingArguments(
                str(tmp_path), **QUIET | {"per_device_train_batch_size": problem.batch} | arguments
            ),
            model_init=lambda: problem.network(),
            train_dataset=problem.dicts,
            eval_dataset=problem.dicts[:64],
            callbacks=[sparse],
        )

    return make


def test_a_method_makes_a_sparsifier_of_each_model_that_is_trained(problem, search, same, tmp_path):
    sparse = SparseTraining(problem.method(), seed=7)
    trainer = search(sparse, save_strategy="steps", save_steps=10)
    trainer.train()
    first = sparse.sparsifier
    same(trainer.model, first, *problem.plain()[:2])
    trainer.train()
    assert sparse.sparsifier is not first
    same(trainer.model, sparse.sparsifier, *problem.plain()[:2])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    same(trainer.model, sparse.sparsifier, *problem.plain()[:2])


def test_a_sparsifier_of_another_model_is_refused(problem, search):
    sparsifier = granet.Sparsifier(problem.network(), problem.method())
    with pytest.raises(ValueError, match=r"does not hold 'net.0.weight' and 2 more.*give SparseTraining a method"):
        search(SparseTraining(sparsifier)).train()
    with pytest.raises(ValueError, match="give seed to the Sparsifier"):
        SparseTraining(sparsifier, seed=1)
    with pytest.raises(ValueError, match="STR gives the model parameters of its own: make a Sparsifier before"):
        SparseTraining(granet.METHODS["str"]())


def test_hyper_parameter_search(problem, search, same, tmp_path):
    pytest.importorskip("optuna", reason="needs pip install optuna").logging.set_verbosity(30)
    sparse = SparseTraining(problem.method(), seed=7)
    trainer, seen = search(sparse, save_strategy="steps", save_steps=12), []

    def finished(metrics):
        seen.append((trainer.model, sparse.sparsifier))
        return metrics["eval_loss"]

    trainer.hyperparameter_search(
        lambda trial: {"num_train_epochs": 1 + trial.number}, finished, n_trials=2, backend="optuna"
    )
    (one, its), (two, other) = seen
    assert one is not two and other.model is two and its.step == problem.steps and other.step == 2 * problem.steps
    same(one, its, *problem.plain()[:2])
    saved = [torch.load(tmp_path / f"run-{n}" / "checkpoint-24" / FILE, weights_only=True) for n in range(2)]
    assert [state["step"] for state in saved] == [24, 24]


@pytest.mark.parametrize(("method", "optimizer"), [("granet", "sgd"), ("rigl", "adamw")])
def test_resume_is_bitwise(method, optimizer, problem, train, same, tmp_path):
    whole = train(method, optimizer, save_strategy="steps", save_steps=10)
    saved = tmp_path / "out" / "checkpoint-10"
    assert sorted(torch.load(saved / FILE, weights_only=True)["masks"]) == sorted(whole[1].masks)
    resumed = train(method, optimizer, resume=str(saved))
    assert resumed[2].state.global_step == problem.steps
    same(*resumed[:2], *whole[:2])


def test_resume_from_elsewhere_is_told_apart(problem, train, same, tmp_path):
    whole = train(folder="out", save_strategy="steps", save_steps=10)
    train("granet", folder="other", save_strategy="steps", save_steps=10, max_norm=0.01)
    saved = str(tmp_path / "out" / "checkpoint-10")
    with pytest.raises(ValueError, match="does not fit the weights"):
        train(folder="other", resume=saved)
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint"):
        train(folder="new", resume=saved)
    moved = train(folder="new", resume=saved, resume_from_checkpoint=saved)
    same(*moved[:2], *whole[:2])


def test_the_best_model_comes_back_with_its_masks(train, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    every = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
    model, sparsifier, trainer = train(**best, **every)  # the "best" here is the one of the largest loss: the first
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6") and sparsifier.step == 6
    saved = torch.load(tmp_path / "out" / "checkpoint-6" / FILE, weights_only=True)
    weights = dict(model.named_parameters())
    for name, mask in sparsifier.masks.items():
        assert torch.equal(mask, saved["masks"][name]) and not weights[name][~mask].any()


def test_compiled_equals_the_plain_loop(problem, train, same, compiles):
    model, sparsifier, _ = train(torch_compile=True, torch_compile_backend=compiles)
    same(model, sparsifier, *problem.plain()[:2])


def test_an_average_kept_by_a_callback_is_followed(problem, tmp_path):
    class Average(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            rule = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
            self.average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=rule)
            self.sparse.follow(self.average)

        def on_step_end(self, args, state, control, model, **kwargs):
            self.average.update_parameters(model)

    callback = Average()

    model = problem.network()
    callback.sparse = sparsifier = granet.Sparsifier(model, problem.method(), seed=7)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=problem.batch, **QUIET),
        train_dataset=problem.dicts,
        optimizers=(problem.optimizer(model), None),
        callbacks=[SparseTraining(sparsifier), callback],
    )
    trainer.train()
    averaged = dict(callback.average.module.named_parameters())
    for name, mask in sparsifier.masks.items():
        assert not averaged[name][~mask].any() and averaged[name][mask].all()
    assert not torch.equal(averaged["net.0.weight"], model.net[0].weight)


def test_logs_have_sparsity_and_reach_tensorboard(problem, train, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason='needs pip install "granet[train]"'
    )
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    board = TensorBoardCallback(SummaryWriter(str(tmp_path / "board")))
    _, sparsifier, trainer = train(logging_strategy="steps", logging_steps=8, callbacks=[board])
    assert [row["sparsity"] for row in trainer.state.log_history][-1] == sparsifier.sparsity
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    (tag,) = [tag for tag in events.Tags()["scalars"] if tag.endswith("sparsity")]
    assert events.Scalars(tag)[-1].value == pytest.approx(sparsifier.sparsity)


def test_wandb_gets_what_is_logged(train, wandb):
    from transformers.integrations import WandbCallback

    _, sparsifier, _ = train(logging_strategy="steps", logging_steps=8, callbacks=[WandbCallback()])
    summary = dict(wandb.run.summary)
    assert summary["train/sparsity"] == pytest.approx(sparsifier.sparsity)
    assert summary["train/exploration"] == pytest.approx(sparsifier.exploration)


def test_mlflow_gets_what_is_logged(train, mlflow):
    from transformers.integrations import MLflowCallback

    _, sparsifier, _ = train(logging_strategy="steps", logging_steps=8, callbacks=[MLflowCallback()])
    run = mlflow.last_active_run()
    assert run.data.metrics["sparsity"] == pytest.approx(sparsifier.sparsity)
    assert len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "exploration")) == 4
