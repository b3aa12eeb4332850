// A worker like worker.py: one job a line, one result a line. ClientKafka asks a ServerKafka with
// a message pattern; both have their defaults. No envelope, no deadline that the service sees.
// Nest chooses the names of its groups and of its reply topic: the pattern's and ".reply".
'use strict';
require('reflect-metadata');
process.env.KAFKAJS_NO_PARTITIONER_WARNING = '1';
const readline = require('node:readline');
const { NestFactory } = require('@nestjs/core');
const { Module, Controller } = require('@nestjs/common');
const { ClientKafka, MessagePattern, Payload, Transport } = require('@nestjs/microservices');
const { firstValueFrom, timeout } = require('rxjs');

const TIMEOUT = 30_000;
let service;
let client;

async function answer(job) {
  class Echo {
    echo(text) {
      return { text: text.text };
    }
  }
  const method = Object.getOwnPropertyDescriptor(Echo.prototype, 'echo');
  Reflect.defineMetadata('design:paramtypes', [Object], Echo.prototype, 'echo');
  Payload()(Echo.prototype, 'echo', 0);
  MessagePattern(job.name)(Echo.prototype, 'echo', method);
  Controller()(Echo);
  class App {}
  Module({ controllers: [Echo] })(App);
  service = await NestFactory.createMicroservice(App, {
    logger: false,
    transport: Transport.KAFKA,
    options: {
      client: { brokers: job.servers.split(','), logLevel: 0 },
      consumer: { groupId: job.name },
      subscribe: { fromBeginning: true },
    },
  });
  await service.listen();
}

async function ask(job) {
  client = new ClientKafka({
    client: { brokers: job.servers.split(','), logLevel: 0 },
    consumer: { groupId: `${job.name}-ask` },
  });
  client.subscribeToResponseOf(job.name);
  await client.connect();
  const data = payload(job);
  const reply = await request(job, data);
  if (JSON.stringify(reply) !== JSON.stringify(data)) throw new Error(JSON.stringify(reply));
}

function payload(job) {
  return { text: 'x'.repeat(job.size - 11) };
}

function request(job, data) {
  return firstValueFrom(client.send(job.name, data).pipe(timeout(TIMEOUT)));
}

async function closed(job) {
  const begin = performance.now() + (job.seconds / 4) * 1000;
  const end = begin + job.seconds * 1000;
  const took = [];
  const data = payload(job);
  let count = 0;
  async function one() {
    for (let sent = performance.now(); sent < end; sent = performance.now()) {
      await request(job, data);
      count += 1;
      const now = performance.now();
      if (begin <= now && now <= end) took.push(now - sent);
    }
  }
  await Promise.all(Array.from({ length: job.level }, one));
  took.sort((left, right) => left - right);
  const at = (place) => took[Math.min(took.length - 1, Math.floor(place * took.length))];
  const result = { count, rate: took.length / job.seconds };
  if (took.length) Object.assign(result, { p50: at(0.5), p99: at(0.99), p999: at(0.999) });
  return result;
}

async function leave() {
  await service?.close();
  await client?.close();
  service = client = undefined;
}

const ROLES = { answer, ask, closed, leave };

async function main() {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const job = JSON.parse(line);
    const result = await ROLES[job.role](job);
    console.log(JSON.stringify(result ?? {}));
  }
  process.exit(0);
}

main();
