"""A finished run -> what is wrong with it."""

from imgcurate.verification.runs import Problem, Verification, verify_run

__all__ = ["Problem", "Verification", "verify_run"]
