// Command controlplane is the five programs of a small Kubernetes control plane in one binary: the tests start
// it once per program, named by the first argument. It holds no logic of its own: every flag is the program's.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

var servers = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllermanager.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
}

func main() {
	if len(os.Args) < 2 {
		fail("name a program: etcd, kubectl, kube-apiserver, kube-controller-manager or kube-scheduler")
	}
	program := os.Args[1]
	os.Args = os.Args[1:]
	switch program {
	case "etcd":
		etcdmain.Main(os.Args)
	case "kubectl":
		if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
			kubectlutil.CheckErr(err)
		}
	default:
		server, known := servers[program]
		if !known {
			fail(fmt.Sprintf("%q is none of etcd, kubectl, kube-apiserver, kube-controller-manager, kube-scheduler", program))
		}
		os.Exit(cli.Run(server()))
	}
}

func fail(reason string) {
	fmt.Fprintln(os.Stderr, "controlplane: "+reason)
	os.Exit(2)
}
