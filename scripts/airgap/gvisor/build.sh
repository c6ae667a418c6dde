# shellcheck shell=bash disable=SC2034,SC2154 # programs.sh reads this file, in this folder
# the shim insists on a lower oom_score_adj, which a host without CAP_SYS_RESOURCE refuses
cp -r "$(go list -m -f '{{.Dir}}' gvisor.dev/gvisor)" "$work/source" && chmod -R u+w "$work/source"
manager=$work/source/pkg/shim/v1/manager.go
grep -q 'oomScoreMax = -999' "$manager" || stop "gvisor: $manager has another oomScoreMax"
sed -i 's/oomScoreMax = -999/oomScoreMax = 0/' "$manager"
cp go.mod go.sum "$work" && go mod edit -replace "gvisor.dev/gvisor=$work/source" "$work/go.mod"
CGO_ENABLED=0 build "-modfile=$work/go.mod" tool
mv "$work/bin/shim" "$work/bin/containerd-shim-runsc-v1"
