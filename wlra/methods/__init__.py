"""The registry: a method is one line here, and inherits the driver and every test of the contract."""

from wlra.linalg.batch import CHUNK
from wlra.methods.accelerate import accelerated, anderson, nesterov, plain
from wlra.methods.closed import fwsvd, kronecker, separable, svd
from wlra.methods.lbfgs import quasi_newton_stage
from wlra.methods.method import Method, Stage, after, crawling
from wlra.methods.newton import newton_stage
from wlra.methods.published import as_published
from wlra.methods.sweeps import als, em
from wlra.methods.varpro import varpro_stage
from wlra.problem import Factors, Problem


def where_it_fits(stage: Stage, other: Stage) -> Stage:
    """The stage where the Gram matrices of all rows and columns take at most CHUNK numbers, else the other one."""

    def choice(problem: Problem, factors: Factors) -> Stage:
        (m, n), k = problem.target.shape, factors.left.shape[1]
        return stage if (m + n) * k * k <= CHUNK else other

    return Stage(
        lambda problem, factors: choice(problem, factors).init(problem, factors),
        lambda problem, factors, aux: choice(problem, factors).step(problem, factors, aux),
    )


def iteration(name: str, *stages: Stage, svd_stages: tuple[Stage, ...] = (), keeps_zeros: bool = True) -> Method:
    """A method of first order, which takes penalties and sparse targets."""
    return Method(name, stages, svd_stages=svd_stages, penalty=True, sparse=True, keeps_zeros=keeps_zeros)


em_anderson = accelerated(em, anderson)
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        iteration("em", accelerated(em, plain), svd_stages=(as_published(plain),)),
        iteration("nesterov", accelerated(em, nesterov), svd_stages=(as_published(nesterov),)),
        iteration("anderson", em_anderson, svd_stages=(as_published(anderson),)),
        iteration("als", accelerated(als, plain, waits=True)),
        iteration("als-anderson", accelerated(als, anderson, waits=True)),
        iteration("lbfgs", quasi_newton_stage, keeps_zeros=False),
        Method("newton", (em_anderson._replace(until=after(5)), newton_stage)),
        Method("varpro", (varpro_stage,)),
        Method(
            "auto",
            (
                em_anderson._replace(until=crawling(12)),
                quasi_newton_stage._replace(until=crawling(100)),
                where_it_fits(newton_stage, quasi_newton_stage),
            ),
        ),
        svd,
        fwsvd,
        separable,
        kronecker,
    )
}
