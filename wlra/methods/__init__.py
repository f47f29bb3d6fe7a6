"""The registry: a method is one line here, and inherits the driver and every test of the contract."""

from wlra.linalg.batch import CHUNK
from wlra.methods.accelerate import accelerated, anderson, nesterov, plain
from wlra.methods.lbfgs import lbfgs
from wlra.methods.method import Method, Stage, after, crawling
from wlra.methods.newton import newton
from wlra.methods.published import published
from wlra.methods.sweeps import als, em
from wlra.methods.varpro import varpro
from wlra.problem import Factors, Problem

stay = [Stage(Method(lambda problem, factors: (factors, ()), lambda problem, factors, aux: (factors, aux)))]


def where_it_fits(method: Method, other: Method) -> Method:
    """The method where the Gram matrices of all rows and columns take at most CHUNK numbers, else the other one."""

    def choice(problem: Problem, factors: Factors) -> Method:
        (m, n), k = problem.target.shape, factors.left.shape[1]
        return method if (m + n) * k * k <= CHUNK else other

    return Method(
        lambda problem, factors: choice(problem, factors).init(problem, factors),
        lambda problem, factors, aux: choice(problem, factors).step(problem, factors, aux),
    )


METHODS: dict[str, list[Stage]] = {
    "em": [Stage(accelerated(em, plain))],
    "nesterov": [Stage(accelerated(em, nesterov))],
    "anderson": [Stage(accelerated(em, anderson))],
    "als": [Stage(accelerated(als, plain, waits=True))],
    "als-anderson": [Stage(accelerated(als, anderson, waits=True))],
    "lbfgs": [Stage(lbfgs)],
    "newton": [Stage(accelerated(em, anderson), after(5)), Stage(newton)],
    "varpro": [Stage(varpro)],
    "auto": [
        Stage(accelerated(em, anderson), crawling(12)),
        Stage(lbfgs, crawling(100)),
        Stage(where_it_fits(newton, lbfgs)),
    ],
}


SWEEPS = ("em", "nesterov", "anderson", "als", "als-anderson")  # they leave components that are zero as they are


PENALISED = (*SWEEPS, "lbfgs")


SPARSE = PENALISED  # what they ask of the target is in wlra/sparse.py


PUBLISHED: dict[str, list[Stage]] = {
    "em": [Stage(published(plain))],
    "nesterov": [Stage(published(nesterov))],
    "anderson": [Stage(published(anderson))],
}
