#!/bin/sh
# The study on two CPU cores, at most 100 minutes: does a mixture pay? Overrides are added to every training:
#
#   WORKERS=2 studies/small.sh data=cifar10_jpeg
#
STUDY=small
. "$(dirname "$0")/study.sh"

at=experiment=cifar10_small_at

questions() {
    # A single model, and three with the weights of Algorithm 1.
    sweep $at L=1,3 seed=0,1
    # Are learned weights better than equal ones?
    sweep $at L=3 lambda_solver=uniform seed=0,1
    sweep $at L=2 seed=0,1
    # What a single model makes of the computing that three members cost.
    sweep $at L=1 trainer.max_epochs=18 seed=0,1
    sweep experiment=cifar10_small_trades L=3,1 seed=0
    # A third one for the question below.
    sweep $at L=1 seed=2
    # The published schedule beside the shared one.
    sweep $at L=2 schedule=sampled seed=0
    sweep $at L=2 lambda_solver=uniform seed=0,1
}

# Do three members need to be trained as a mixture?
afterwards() { solve apart "$(run_name $at L=1 seed=0)" "$(run_name $at L=1 seed=1)" "$(run_name $at L=1 seed=2)"; }

main
