"""Whether a teacher fits a student."""

from __future__ import annotations

from torch import nn

from ..errors import IncompatibleTeacherError, UnsupportedModelError

__all__ = ["refuse_compiled", "refuse_other_shape", "refuse_shared"]


def refuse_compiled(model: nn.Module, remedy: str) -> None:
    """Refuses what ``torch.compile`` returned, whose parts have other names.

    Args:
        model: A student or a teacher.
        remedy: What to do, the end of a sentence.

    Raises:
        UnsupportedModelError: It was.
    """
    # The attribute of torch._dynamo.OptimizedModule; importing that takes seconds.
    if "_orig_mod" in model._modules:
        raise UnsupportedModelError(f"the model is what torch.compile returned; {remedy}.")


def refuse_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses a student and a teacher that share a parameter.

    Args:
        student: The prepared model.
        teacher: The full-precision model.

    Raises:
        IncompatibleTeacherError: They share one.
    """
    own = {id(p): name for name, p in student.named_parameters()}
    for parameter in teacher.parameters():
        if id(parameter) in own:
            raise IncompatibleTeacherError(
                f"student and teacher share the parameter {own[id(parameter)]!r}; prepare a copy: "
                "student = tutelage.prepare(copy.deepcopy(teacher), scheme)."
            )


def refuse_other_shape(
    student: tuple[tuple[int, int, int], ...], teacher: tuple[tuple[int, int, int], ...]
) -> None:
    """Refuses a teacher of another depth or width.

    Args:
        student: ``SiteMap.shape`` of the student.
        teacher: ``SiteMap.shape`` of the teacher.

    Raises:
        IncompatibleTeacherError: They differ.
    """
    if len(student) != len(teacher):
        raise IncompatibleTeacherError(
            f"the student has {len(student)} attention blocks, the teacher {len(teacher)}; they "
            "must be of the same depth."
        )
    for index, (own, other) in enumerate(zip(student, teacher, strict=True)):
        if own != other:
            raise IncompatibleTeacherError(
                f"block {index} of the student has (heads, width of a head, hidden width) {own}, "
                f"the teacher's {other}; they must be of the same shape."
            )
