"""Two clocks, the host's and the device's, and what the seconds went to."""

from collections import defaultdict

from seal_engine.forecast.rates import Count, Gpu, assumed

STARTS = "device: starts of kernels"
Work = tuple[str, float]  # what bounds it, such as "base products: matrix rate", and its seconds


class Timeline:
    """Phases one after another, in sections. A phase's work begins once its launches begin, and ends after they end.

    Where nothing waits, a phase so takes what takes longer, host or device. Where the host waits for the device, it
    goes on from the later of the two clocks, and what it does then adds to what the device did.
    """

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.host = self.device = self.begun = 0.0
        self.section = ""
        self.elapsed: defaultdict[str, float] = defaultdict(float)  # seconds by section
        self.busy: dict[str, defaultdict[str, float]] = {}  # of the device, by section and what bounds it
        self.exposed: dict[
            str, defaultdict[str, float]
        ] = {}  # of the host, in which the device has nothing to do; likewise

    def begin(self, section: str) -> None:
        """End the section before, with all its work, and go on with another, or with one that was left."""
        now = max(self.host, self.device)
        self.elapsed[self.section] += now - self.begun
        self.section, self.host, self.device, self.begun = section, now, now, now
        self.busy.setdefault(section, defaultdict(float))
        self.exposed.setdefault(section, defaultdict(float))

    def wait_until(self, time: float) -> None:
        """The host does nothing more before this time of the device's clock."""
        self.host = max(self.host, time)

    def work(self, kind: str, flops: float = 0, moved: float = 0) -> Work:
        """Work of so many FLOPs and bytes: one hides the other."""
        share = assumed("device: share of its rates")
        matrix, copy = flops / (share * self.gpu.matrix_rate), moved / (share * self.gpu.copy_rate)
        return (f"{kind}: matrix rate", matrix) if matrix > copy else (f"{kind}: bandwidth", copy)

    def phase(self, count: Count, *work: Work, host: Work = ("host: Python", 0.0), graph_kernels: int = 0) -> None:
        """The host waits, does what `host` says and launches, and the device does the work."""
        busy, exposed, waiting = (
            self.busy[self.section],
            self.exposed[self.section],
            count.waits * assumed("host: wait"),
        )
        if count.waits:
            self.host = max(self.host, self.device) + waiting
            exposed["host: waits"] += waiting
        launching = count.torch * assumed("host: launch of torch") + count.triton * assumed("host: launch of Triton")
        launching += assumed("host: launch of a graph") if graph_kernels else 0.0
        starts = (count.torch + count.triton) * assumed("device: kernel")
        starts += graph_kernels * assumed("device: kernel of a graph")
        seconds = starts + sum(own for _, own in work)
        begun = max(self.device, self.host)
        self.host += host[1] + launching
        self.device = max(self.host, begun + seconds)
        if host[1] + launching > seconds:
            exposed[host[0]] += host[1]
            exposed["host: launches"] += launching
        for bound, own in (*work, (STARTS, starts)):
            busy[bound] += own
