// The witness of test_observed_against_otelhttp.py: a reverse proxy that is instrumented as the
// queue-proxy of Knative 1.19 and later is, with the libraries that it uses.
//
// otelhttp-witness USER_PORT: listens on two free ports of loopback, prints "PROXY METRICS".
package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/otlptranslator"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	exporter "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/trace/noop"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func main() {
	registry := prometheus.NewRegistry()
	reader := must(exporter.New(
		exporter.WithRegisterer(registry),
		exporter.WithTranslationStrategy(otlptranslator.UnderscoreEscapingWithSuffixes),
	))
	meters := metric.NewMeterProvider(metric.WithReader(reader))
	tracers := noop.NewTracerProvider()

	user := must(url.Parse("http://127.0.0.1:" + os.Args[1]))
	proxy := httputil.NewSingleHostReverseProxy(user)
	proxy.Transport = otelhttp.NewTransport(http.DefaultTransport,
		otelhttp.WithMeterProvider(meters), otelhttp.WithTracerProvider(tracers))
	proxy.ErrorHandler = func(w http.ResponseWriter, r *http.Request, err error) {
		http.Error(w, err.Error(), http.StatusBadGateway)
	}
	tagged := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		labels, _ := otelhttp.LabelerFromContext(r.Context())
		labels.Add(attribute.String("kn.route.tag", "kn:disabled"))
		proxy.ServeHTTP(w, r)
	})
	handler := otelhttp.NewHandler(tagged, "queue",
		otelhttp.WithMeterProvider(meters), otelhttp.WithTracerProvider(tracers))

	traffic := must(net.Listen("tcp", "127.0.0.1:0"))
	metrics := must(net.Listen("tcp", "127.0.0.1:0"))
	go http.Serve(metrics, promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	fmt.Println(traffic.Addr().(*net.TCPAddr).Port, metrics.Addr().(*net.TCPAddr).Port)
	http.Serve(traffic, handler)
}
