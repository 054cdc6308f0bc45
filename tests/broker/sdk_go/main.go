// The official CloudEvents SDK for Go as a witness. "read": an HTTP request on standard input, what
// is in its events as JSON on standard output, data in base64. "write": events as JSON on standard input, the batch
// that the SDK makes of them as an HTTP request on standard output.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"log"
	"net/http"
	"os"

	"github.com/cloudevents/sdk-go/v2/event"
	cehttp "github.com/cloudevents/sdk-go/v2/protocol/http"
)

func main() {
	if os.Args[1] == "read" {
		read()
	} else {
		write()
	}
}

func read() {
	request, err := http.ReadRequest(bufio.NewReader(os.Stdin))
	check(err)
	var events []event.Event
	if cehttp.IsHTTPBatch(request.Header) {
		events, err = cehttp.NewEventsFromHTTPRequest(request)
		check(err)
	} else {
		one, err := cehttp.NewEventFromHTTPRequest(request)
		check(err)
		events = append(events, *one)
	}
	found := []map[string]any{}
	for _, each := range events {
		check(each.Validate())
		found = append(found, map[string]any{
			"id": each.ID(), "subject": each.Subject(), "type": each.DataContentType(),
			"extensions": each.Extensions(), "data": each.Data(),
		})
	}
	check(json.NewEncoder(os.Stdout).Encode(found))
}

func write() {
	var events []event.Event
	check(json.NewDecoder(os.Stdin).Decode(&events))
	request, err := cehttp.NewHTTPRequestFromEvents(context.Background(), "http://x/", events)
	check(err)
	check(request.Write(os.Stdout))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
