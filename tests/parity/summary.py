"""The lines that sum a golden folder up; counted from test reports, which reach whoever prints, also when
several processes share the tests.
"""

from golden import Golden

OUTPUT, COMPARED = "golden_output", "golden_compared"
"""Properties of a test: the output it asks for, and again once ours was made."""


class Summary:
    """A pytest plugin."""

    def __init__(self, golden: Golden):
        self.golden = golden
        self.asked: set[str] = set()
        self.made: set[str] = set()
        self.equal: set[str] = set()

    def pytest_runtest_logreport(self, report):
        if report.when != "call":
            return
        properties = dict(report.user_properties)
        if key := properties.get(OUTPUT):
            self.asked.add(key)
            if COMPARED in properties:
                self.made.add(key)
            if report.passed:
                self.equal.add(key)

    def pytest_terminal_summary(self, terminalreporter):
        for line in self.lines() if self.asked else ():
            terminalreporter.write_line(f"golden: {line}")

    def lines(self) -> list[str]:
        keys = self.golden.output_keys
        return [
            *(f"not compared: {key}" for key in keys if key not in self.made),
            *(f"differs: {key}" for key in keys if key in self.made - self.equal),
            f"compared {len(self.equal)} of {len(keys)} outputs",
        ]
