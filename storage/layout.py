"""Room `storage`: where the artefacts of a run are.

<root>/<run>/plan, basis, figures
<root>/<run>/stages/00/samples, windows, start, ledger/seg-00000, trained, local/seg-00000, embeddings, index, targets,
scores, profile, replay/<target>/seg-00000, gradients/00000, removals/<step>-<sample>, audit/<removals>, trial/<name>, decided/<name>,
rewritten/<name>/00000, prune/<name>
<root>/<run>-compare/seed-<seed>/<arm>, a run; and report/<name>
"""

from __future__ import annotations

from secateur.storage.folder import Folder
from secateur.storage.outputs import Output


class StageFolder:
    """One stage's artefacts."""

    def __init__(self, root: Folder) -> None:
        self.root = root
        self.samples = self._artefact("samples")
        self.windows = self._artefact("windows")
        self.start = self._artefact("start")
        self.trained = self._artefact("trained")
        self.embeddings = self._artefact("embeddings")
        self.index = self._artefact("index")
        self.targets = self._artefact("targets")
        self.scores = self._artefact("scores")
        self.report = self._artefact("report")
        self.profile = self._artefact("profile")

    def segment(self, number: int) -> Output:
        """Ledger of a segment and the checkpoint at its end, committed together."""
        return self._artefact(f"ledger/seg-{number:05d}")

    def segments(self) -> list[Output]:
        """The committed segments, in order, up to the first that is missing."""
        found: list[Output] = []
        while (segment := self.segment(len(found))).committed:
            found.append(segment)
        return found

    def local(self, number: int) -> Output:
        """A segment's embeddings as of its own end, and its transition; gone once the stage's are composed."""
        return self._artefact(f"local/seg-{number:05d}")

    def replay(self, target: str, number: int) -> Output:
        """A segment's scores by replay for a target, and the adjoint at its start."""
        return self._artefact(f"replay/{target}/seg-{number:05d}")

    def gradients(self, number: int) -> Output:
        """The targets' gradients at the start of a segment, or with the number of segments at the stage's end."""
        return self._artefact(f"gradients/{number:05d}")

    def removal(self, step: int, sample: int) -> Output:
        """What leaving a sample out of a step did, for an audit."""
        return self._artefact(f"removals/{step:07d}-{sample}")

    def audit(self, removals: int) -> Output:
        """An audit of so many removals."""
        return self._artefact(f"audit/{removals}")

    def trial(self, name: str) -> Output:
        """The trial of a pruning, under the pruning's name."""
        return self._artefact(f"trial/{name}")

    def decided(self, name: str) -> Output:
        """What a pruning keeps and drops; gone once its shards are written."""
        return self._artefact(f"decided/{name}")

    def rewritten(self, name: str, number: int) -> Output:
        """One shard of a pruning, by its place among the stage's shards; gone once they are together."""
        return self._artefact(f"rewritten/{name}/{number:05d}")

    def prune(self, name: str) -> Output:
        """Decisions and pruned shards under one policy; `plan` is the plan's own."""
        return self._artefact(f"prune/{name}")

    def _artefact(self, path: str) -> Output:
        return Output(self.root.child(*path.split("/")))


class RunFolder:
    """A run's artefacts."""

    def __init__(self, url: str) -> None:
        self.root = Folder(url)
        self.url = self.root.url
        self.plan = Output(self.root.child("plan"))
        self.basis = Output(self.root.child("basis"))
        self.figures = Output(self.root.child("figures"))

    def stage(self, number: int) -> StageFolder:
        """A stage's artefacts."""
        return StageFolder(self.root.child("stages", f"{number:02d}"))


class ComparisonFolder:
    """The runs of a comparison, and its reports."""

    def __init__(self, root: str, run: str) -> None:
        self.root = Folder(f"{root.rstrip('/')}/{run}-compare")

    def seed(self, number: int) -> Folder:
        """The folder that holds a seed's runs, one an arm."""
        return self.root.child(f"seed-{number}")

    def report(self, name: str) -> Output:
        """Table, plot and figures."""
        return Output(self.root.child("report", name))
