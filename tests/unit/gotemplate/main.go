// The witness of test_gotemplate.py: renders templates of request logs with Go's own text/template.
//
// Reads one JSON object a line on standard input, {"template", "request"}: the request is the bytes
// of its head, parsed by net/http as its server would. Writes {"out"} or {"error"} a line.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"net/http"
	"os"
	"text/template"
)

type response struct {
	Code    int
	Size    int
	Latency float64
}

type revision struct {
	Name, Namespace, Service, Configuration, PodName, PodIP string
}

type entry struct {
	Request  *http.Request
	Response *response
	Revision *revision
	TraceID  string
}

type question struct {
	Template []byte
	Request  []byte
	TLS      bool
}

type answer struct {
	Out   []byte `json:"out"`
	Error string `json:"error"`
	Stage string `json:"stage"`
}

func render(q question) answer {
	request, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(q.Request)))
	if err != nil {
		return answer{Error: err.Error(), Stage: "request"}
	}
	request.RemoteAddr = "10.1.2.3:4567"
	if q.TLS {
		request.TLS = &tls.ConnectionState{HandshakeComplete: true}
	}
	parsed, err := template.New("requestLog").Parse(string(q.Template))
	if err != nil {
		return answer{Error: err.Error(), Stage: "parse"}
	}
	var out bytes.Buffer
	err = parsed.Execute(&out, &entry{
		Request:  request,
		Response: &response{Code: 201, Size: 5, Latency: 0.041670486},
		Revision: &revision{"hello-00001", "default", "hello", "hello", "pod-1", "10.0.0.1"},
		TraceID:  "0af7651916cd43dd8448eb211c80319c",
	})
	if err != nil {
		return answer{Error: err.Error(), Stage: "render"}
	}
	return answer{Out: out.Bytes()}
}

func main() {
	in := json.NewDecoder(bufio.NewReader(os.Stdin))
	out := json.NewEncoder(os.Stdout)
	for in.More() {
		var q question
		if err := in.Decode(&q); err != nil {
			panic(err)
		}
		if err := out.Encode(render(q)); err != nil {
			panic(err)
		}
	}
}
