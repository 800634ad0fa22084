"""Every exception that the package raises on purpose.

    BtmError                  exit 1   something failed while running
    ├── UserError             exit 2   the plan, the call or the text is wrong; nothing was spent
    │   ├── PlanError                  one or more fields of a plan
    │   ├── TextError                  a source that cannot be used
    │   ├── IncompatibleError          models that cannot be averaged or ensembled
    │   ├── FoundationError            a plan that changes what this store's forest was founded on
    │   ├── ResourcesError             a demand that the cluster can never meet
    │   └── UnknownModelError          a model that is not served
    ├── StoreError                     the store did not do what was asked
    │   ├── MissingError               an object or artifact that should be there
    │   └── IntegrityError             bytes that are not those that were written
    ├── TrainingError                  training that cannot go on, such as one out of memory
    │   └── DivergedError              a loss or weights that are not finite: the recipe's doing
    ├── StepError                      steps that failed on the cluster, by name, attempts and cause
    ├── BusyError                      as many requests wait as may
    ├── ClosedError                    an engine that has failed or was told to end
    ├── OutputError                    standard output cannot be written; exit 141 where its reader has gone
    └── Stopped               exit 130 the user or the cluster asked to stop; everything was saved
        └── BudgetError                the plan's budget is spent

Each carries four parts: what failed, what was found, what was expected, the remedy. All of them survive
pickling, since Ray carries them between processes.
"""


class BtmError(Exception):
    """Base of the tree: ``what`` failed, ``found`` against ``expected``, and the ``remedy``."""

    exit_code = 1

    def __init__(self, what: str, *, found: str = "", expected: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.found = found
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [self.what]
        if self.found:
            parts.append(f"  found:    {self.found}")
        if self.expected:
            parts.append(f"  expected: {self.expected}")
        if self.remedy:
            parts.append(f"  remedy:   {self.remedy}")
        return "\n".join(parts)


class UserError(BtmError):
    exit_code = 2


class PlanError(UserError):
    pass


class TextError(UserError):
    pass


class IncompatibleError(UserError):
    pass


class FoundationError(UserError):
    pass


class ResourcesError(UserError):
    pass


class UnknownModelError(UserError):
    pass


class StoreError(BtmError):
    pass


class MissingError(StoreError):
    pass


class IntegrityError(StoreError):
    pass


class TrainingError(BtmError):
    pass


class DivergedError(TrainingError):
    pass


class StepError(BtmError):
    pass


class BusyError(BtmError):
    pass


class ClosedError(BtmError):
    pass


class OutputError(BtmError):
    pass


class Stopped(BtmError):
    exit_code = 130


class BudgetError(Stopped):
    pass


def one_line(exc: BaseException, most: int = 300) -> str:
    """The message of another library's exception, for an error of ours: on one
    line, at most so many characters."""
    return " ".join(str(exc).split())[:most] or type(exc).__name__
