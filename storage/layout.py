"""The folders of a run, and the output that each of them holds.

<root>/<run>/plan, basis, figures
<root>/<run>/stages/00/samples, windows, start, ledger/seg-00000, trained, embedded/00000,
components, embeddings, index, targets, scores, report, profile, agreement,
replay/<target>/seg-00000, gradients/00000, removals/<step>-<sample>, removals/group-<hash>,
copies/<similarity>, audit/<removals>, trial/<name>, decided/<name>, rewritten/<name>/00000,
prune/<name>
<root>/<run>-compare/seed-<seed>/<arm>, each of which is a run, and report/<name>

The methods below say what each output holds. `embedded`, `decided` and `rewritten` are
intermediate: they are removed once the outputs that are made from them are committed.
"""

from __future__ import annotations

from secateur.storage.folder import Folder
from secateur.storage.outputs import Output

PLAN_PRUNING = "plan"  # the name of the pruning by the plan's own policy


class StageFolder:
    """The outputs of one stage.

    Attributes:
        samples: the list of the stage's samples.
        windows: the automatic windows that were chosen when the stage began.
        start: the run's first checkpoint; only stage 0 has one.
        trained: the mark that the stage is trained to its end.
        components: the directions that embeddings are reduced to, if they are.
        embeddings: the embeddings and the stage's transition.
        index: the FAISS index of the embeddings.
        targets: the targets' gradients at the stage's end, and their metrics.
        scores: the score of every use of a sample.
        report: the HTML report.
        profile: the influence profile.
        agreement: how far the answers of the stage's embeddings agree with replay.
    """

    def __init__(self, root: Folder) -> None:
        self.root = root
        self.samples = self._output("samples")
        self.windows = self._output("windows")
        self.start = self._output("start")
        self.trained = self._output("trained")
        self.components = self._output("components")
        self.embeddings = self._output("embeddings")
        self.index = self._output("index")
        self.targets = self._output("targets")
        self.scores = self._output("scores")
        self.report = self._output("report")
        self.profile = self._output("profile")
        self.agreement = self._output("agreement")

    def segment(self, number: int) -> Output:
        """Return the ledger of a segment and the checkpoint at its end, committed together."""
        return self._output(f"ledger/seg-{number:05d}")

    def segments(self) -> list[Output]:
        """Return the committed segments in order, up to the first that is missing."""
        segments: list[Output] = []
        while (segment := self.segment(len(segments))).committed:
            segments.append(segment)
        return segments

    def embedded(self, number: int) -> Output:
        """Return a part of the stage's embeddings.

        It is removed once the embeddings of the whole stage are composed.
        """
        return self._output(f"embedded/{number:05d}")

    def replay(self, name: str, number: int) -> Output:
        """Return the scores of a segment by replay, and the adjoint at its start.

        Args:
            name: a target, or a question that `agreement` is measured by. Those of questions are
                removed once it is.
            number: of the segment.
        """
        return self._output(f"replay/{name}/seg-{number:05d}")

    def gradients(self, number: int) -> Output:
        """Return the targets' gradients at the start of a segment.

        If the stage has n segments, number n is the stage's end.
        """
        return self._output(f"gradients/{number:05d}")

    def removal(self, step: int, sample: int) -> Output:
        """Return the effect of leaving a sample out of a step, for an audit."""
        return self._output(f"removals/{step:07d}-{sample}")

    def group_removal(self, digest: str) -> Output:
        """Return the effect of leaving a group of uses out, by a hash of the uses."""
        return self._output(f"removals/group-{digest}")

    def copies(self, similarity: float) -> Output:
        """Return which samples are copies, with this least similarity between two of them."""
        return self._output(f"copies/{similarity:g}")

    def audit(self, removals: int) -> Output:
        """Return the audit with this number of removals."""
        return self._output(f"audit/{removals}")

    def trial(self, name: str) -> Output:
        """Return the trial of a pruning, by the name of the pruning."""
        return self._output(f"trial/{name}")

    def decided(self, name: str) -> Output:
        """Return the decisions of a pruning. They are removed once its shards are written."""
        return self._output(f"decided/{name}")

    def rewritten(self, name: str, number: int) -> Output:
        """Return one shard of a pruning, by its position among the stage's shards.

        It is removed once all shards are collected in the pruning's output.
        """
        return self._output(f"rewritten/{name}/{number:05d}")

    def prune(self, name: str) -> Output:
        """Return the decisions and shards of a pruning by name, see `PLAN_PRUNING`."""
        return self._output(f"prune/{name}")

    def _output(self, path: str) -> Output:
        return Output(self.root.child(*path.split("/")))


class RunFolder:
    """The outputs of a run.

    Attributes:
        plan: the plan that the run was started with.
        basis: the fitted basis.
        figures: the metrics of a finished arm of a comparison; other runs have none.
    """

    def __init__(self, url: str) -> None:
        self.root = Folder(url)
        self.url = self.root.url
        self.plan = Output(self.root.child("plan"))
        self.basis = Output(self.root.child("basis"))
        self.figures = Output(self.root.child("figures"))

    def stage(self, number: int) -> StageFolder:
        """Return the outputs of a stage."""
        return StageFolder(self.root.child("stages", f"{number:02d}"))


class ComparisonFolder:
    """The runs of a comparison, and its reports."""

    def __init__(self, root: str, run: str) -> None:
        self.root = Folder(f"{root.rstrip('/')}/{run}-compare")

    def seed(self, number: int) -> Folder:
        """Return the folder of a seed, which holds one run per arm."""
        return self.root.child(f"seed-{number}")

    def report(self, name: str) -> Output:
        """Return a report: table, plot and figures."""
        return Output(self.root.child("report", name))
