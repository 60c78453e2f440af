#!/bin/sh
# Where does a mixture pay? Five seeds, and for each seed another draw of the data; about an hour of two CPU cores.
# Overrides are added to every training:
#
#   WORKERS=2 studies/pays.sh
#
# Recipes and radii were chosen on the draws 100 to 104. The draws 10 to 14 had no part in that.
STUDY=pays
. "$(dirname "$0")/study.sh"

seeds=seed=10,11,12,13,14
measure="protocol=strict protocol.diagnosed=0 logger=csv baseline=false data.draw=\${seed}"

averages32="experiment=averaged_digits"
averages16="experiment=averaged_digits data.average=16 data.val_fraction=0.15 eps=1.03"
triangle="experiment=triangle"
digits="experiment=averaged_digits data.classes=null data.average=1 data.copies=1 data.val_fraction=0.15"
digits_l2="$digits eps=1.1"
digits_linf="$digits threat_model=linf eps=0.15"

# These words turn the recipe (antithetic class weights, random targets, a larger radius) off.
plain="loss.class_weights=null attack.targets=none attack.eps_scale=1"

# The recipe, the published algorithm, and one model as published with twice the epochs.
# Arguments: setting, seeds, epochs per model, twice as many.
# shellcheck disable=SC2086
basic() {
    sweep $1 $measure $2 "trainer.max_epochs=$3"
    sweep $1 $measure $2 "trainer.max_epochs=$3" $plain lambda_solver=oracle schedule.T_theta=20
    sweep $1 $measure $2 L=1 "trainer.max_epochs=$4" $plain
}

# One model with all tricks, all but the class weights or none of them, and twice the epochs or twice the parameters;
# members one after the other.
# Arguments: setting, layers with twice the parameters.
# shellcheck disable=SC2086
further() {
    sweep $1 $measure "$seeds" L=1 trainer.max_epochs=80
    sweep $1 $measure "$seeds" L=1 trainer.max_epochs=40 "model.hidden=$2"
    sweep $1 $measure "$seeds" L=1 trainer.max_epochs=80 loss.class_weights=null
    sweep $1 $measure "$seeds" L=1 trainer.max_epochs=40 "model.hidden=$2" $plain
    sweep $1 $measure "$seeds" trainer.max_epochs=40 $plain schedule=grow lambda_solver=held_out L=2 schedule.start=fresh
}

# One network, trained with random targets to the last epoch, and copies of it with other biases, weighed on validation
# images. Arguments: setting, epochs.
# shellcheck disable=SC2086
biases() {
    how="L=1 trainer.max_epochs=$2 trainer.check_val_every_n_epoch=$2 loss.class_weights=null"
    sweep $1 $measure "$seeds" $how
    for seed in 10 11 12 13 14; do
        run=$(run_name $1 $measure "seed=$seed" $how)
        # Another worker is at it, and comes here afterwards.
        [ -e "$SWEEP/$run/DONE" ] || continue
        weighed="outputs/solve/study-pays/$run"
        mixadv task=solve "members=['$SWEEP/$run']" 'biases=[0.1,0.3,1]' lambda_solver=lp "seed=$seed" \
            '~protocol.attacks.square' '~protocol.attacks.subsets' logger=csv "hydra.run.dir='$weighed'"
        mixadv task=evaluate "mixture='$weighed'" protocol=strict protocol.diagnosed=0 logger=csv "seed=$seed" \
            "hydra.run.dir='$SWEEP/biases,$run'"
    done
}

# One model with the smoothed 0/1 loss on the worst of two attacks. Arguments: setting, epochs.
# shellcheck disable=SC2086
smoothed() {
    sweep $1 $measure "$seeds" L=1 "trainer.max_epochs=$2" loss=zero_one_smoothed loss.class_weights=null \
        'attack.worst_of=[expected,smoothed]'
}

# Growing beside Algorithm 2 and one model, each with as many passes of the attack: with L = 3 and E epochs of a grown
# member, 2 E and 6 E epochs.
# shellcheck disable=SC2086
cifar() {
    small="data=cifar10_jpeg data.num_train=4000 data.num_val=500 data.num_test=300 model=mlp eps=4/255"
    how="scheduler=one_cycle optimizer.lr=0.05 attack.num_steps=5 trainer.accelerator=cpu protocol=strict"
    jobs="$small $how protocol.diagnosed=0 logger=csv seed=10,11"
    sweep $jobs L=3 schedule=grow trainer.max_epochs=8
    sweep $jobs L=3 schedule=shared schedule.T_theta=20 trainer.max_epochs=16
    sweep $jobs L=1 trainer.max_epochs=48
}

# shellcheck disable=SC2086
questions() {
    basic "$averages32" "$seeds" 40 80
    biases "$averages32" 40
    further "$averages32" '[181,181]'
    basic "$averages16" "$seeds" 40 80
    biases "$averages16" 40
    further "$averages16" '[181,181]'
    basic "$triangle" "$seeds" 40 80
    further "$triangle" '[92,92]'
    # Against the radius.
    for eps in 0.98 1.02 1.12; do basic "$averages32 eps=$eps" seed=10,11 40 80; done
    # Where nothing can be gained.
    basic "$digits_l2" "$seeds" 20 40
    basic "$digits_linf" "$seeds" 20 40
    smoothed "$averages32" 80
    # Algorithm 2 with sampled updates, as published; the rows above share each attack.
    sweep $averages32 $measure "$seeds" trainer.max_epochs=40 $plain lambda_solver=oracle schedule=sampled \
        schedule.T_theta=20
    cifar
}

# The ceilings of the test images, exact where the trainings only bounded them.
ceilings() {
    for draw in 10 11 12 13 14; do
        for average in 16 32; do
            val=0.15
            [ "$average" = 16 ] || val=0.3
            mixadv task=ceiling data=digits 'data.classes=[1,5,7]' data.average=$average data.copies=3 \
                data.val_fraction=$val "data.draw=$draw" threat_model=l2 \
                'ceiling.eps=[0.98,1.02,1.03,1.06,1.12]' ceiling.split=test \
                "hydra.run.dir='$SWEEP/ceiling,average=$average,draw=$draw'"
        done
    done
}

afterwards() { ceilings; }

# Runs are many: their numbers go into two tables, one line for each run and one number for each image.
publish() {
    mkdir -p results/pays
    "$PYTHON" studies/pays.py "$SWEEP" results/pays
}

main
