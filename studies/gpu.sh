#!/bin/sh
# The study with ResNet-18 on one GPU, most informative first: stop it at any time, run it again to go on. Overrides are
# added to every training, as data.root=DIR or data=cifar10_jpeg:
#
#   studies/gpu.sh
#
STUDY=gpu
. "$(dirname "$0")/study.sh"

short=experiment=cifar10_gpu_short

questions() {
    # A single model, and three with the weights of Algorithm 1.
    sweep $short L=1,3 seed=0
    # What a single model makes of the computing that three members cost.
    sweep $short L=1 trainer.max_epochs=60 seed=0
    sweep $short L=3 lambda_solver=uniform,entropic seed=0
    sweep $short loss=trades L=1,3 seed=0
    # How much the seed moves all that.
    sweep $short L=1 seed=1,2
    sweep $short L=3 seed=1
    sweep $short L=2,4 seed=0
    sweep $short loss=trades lambda_solver=entropic L=3 seed=0
}

# Do three members need to be trained as a mixture?
afterwards() { solve apart "$(run_name $short L=1 seed=0)" "$(run_name $short L=1 seed=1)" "$(run_name $short L=1 seed=2)"; }

main
